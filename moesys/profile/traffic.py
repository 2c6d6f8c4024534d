"""Bytes that this rank sends, counted call by call: every collective and send of torch.distributed that runs within,
forward, backward and in hooks, ours, FSDP's and the pipeline's.

    with TrafficCounter() as counter:
        train_step(...)
    counter.sent[(0, 1), "all_reduce"].bytes        # to whom, how

What a call sends is a convention that no algorithm beats, of a group of n ranks:

    all_reduce        2 (n - 1) / n of its bytes, as a reduce-scatter and an all-gather
    all_gather        n - 1 times its input          reduce_scatter    (n - 1) / n of its input
    all_to_all        what is for others             send              its bytes
    broadcast, scatter    the root n - 1 times what one rank gets; reduce, gather: every other rank its bytes

A wait and a barrier send nothing. A group of one rank sends nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesys.parallel.mesh import Meshes

Rule = Callable[[Mapping[str, Any], int, int], Fraction]
"""From a call's arguments by name, this rank's index in the group and the group's size to bytes sent."""


@dataclass
class Traffic:
    """What one kind of call sent to one group."""

    calls: int = 0
    bytes: Fraction = field(default_factory=Fraction)


class TrafficCounter(TorchDispatchMode):
    """Counts what this thread, and the backward passes that it starts on a CPU, send.

    Raises NotImplementedError at a call that has no convention: nothing is left out in silence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[tuple[int, ...], str], Traffic] = {}
        """By the group's ranks and the kind of call."""

    @property
    def total_bytes(self) -> Fraction:
        """To all groups, by all kinds."""
        return sum((traffic.bytes for traffic in self.sent.values()), Fraction(0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args, options)
        return func(*args, **options)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in SILENT:
            return
        if name not in RULES:
            raise NotImplementedError(f"no convention says what {func} sends")
        kind, rule = RULES[name]
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        group = process_group(given)
        size = dist.get_world_size(group)
        if size == 1:
            return
        ranks = tuple(dist.get_process_group_ranks(group))
        traffic = self.sent.setdefault((ranks, kind), Traffic())
        traffic.calls += 1
        traffic.bytes += rule(given, dist.get_rank(group), size)


def process_group(given: Mapping[str, Any]) -> dist.ProcessGroup:
    """The group among a call's arguments: boxed, or by its name."""
    if "group_name" in given:
        return _resolve_process_group(given["group_name"])
    return dist.ProcessGroup.unbox(given["process_group"])  # type: ignore[attr-defined]


def group_names(meshes: Meshes) -> dict[tuple[int, ...], list[str]]:
    """The axes and other names of each group that this rank is in; groups of the same ranks are one."""
    groups = {
        "tp": meshes.tp_group,
        "cp": meshes.cp_group,
        "pp": meshes.pp_group,
        "ep": meshes.ep_group,
        "etp": meshes.etp_group,
        "shard": meshes.dense.get_group("shard"),
        "dp_replicate": meshes.dense.get_group("dp_replicate"),
        "edp_shard": meshes.expert.get_group("edp_shard"),
        "edp_replicate": meshes.expert.get_group("edp_replicate"),
        "edp": meshes.edp_group,
        "sequence": meshes.sequence_group,
        "replica": meshes.replica_group,
        "stage": meshes.stage_group,
        "world": dist.group.WORLD,
    }
    found: dict[tuple[int, ...], list[str]] = {}
    for name, group in groups.items():
        found.setdefault(tuple(dist.get_process_group_ranks(group)), []).append(name)
    return found


def _bytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))


def _all_reduce(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    return Fraction(2 * (size - 1) * _bytes(_source(given)), size)


def _all_gather(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    return Fraction((size - 1) * _bytes(_source(given)))


def _reduce_scatter(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    return Fraction((size - 1) * _bytes(_source(given)), size)


def _all_to_all(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    source = _source(given)
    splits = given.get("input_split_sizes") or []
    if not splits:
        return Fraction((size - 1) * source.nbytes, size)
    row_bytes = Fraction(source.nbytes, max(source.shape[0], 1))
    return (sum(splits) - splits[rank]) * row_bytes


def _all_to_all_list(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    sources = given["input_tensors"]
    return Fraction(_bytes(sources) - _bytes(sources[rank]))


def _send(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    return Fraction(_bytes(_source(given)))


def _from_root(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    one = _bytes(given["output_tensors"] if "output_tensors" in given else _source(given))
    return Fraction((size - 1) * one if rank == _root(given) else 0)


def _to_root(given: Mapping[str, Any], rank: int, size: int) -> Fraction:
    return Fraction(0 if rank == _root(given) else _bytes(_source(given)))


def _root(given: Mapping[str, Any]) -> int:
    return given["root_rank"] if "root_rank" in given else given["src"]


def _source(given: Mapping[str, Any]) -> Any:
    """The tensors that a call reads, under whatever name its schema has for them."""
    names = ("input_tensors", "input_tensor", "input_list", "inputs", "input", "tensors", "tensor")
    return next(given[name] for name in names if name in given)


SILENT = {
    *("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "check_for_nan"),
    *("recv_", "recv_any_source_"),
}
RULES: dict[str, tuple[str, Rule]] = {
    **dict.fromkeys(
        ["allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_", "all_reduce_coalesced"],
        ("all_reduce", _all_reduce),
    ),
    **dict.fromkeys(
        [
            *("_allgather_base_", "allgather_", "allgather_coalesced_"),
            *("allgather_into_tensor_coalesced_", "all_gather_into_tensor"),
            *("all_gather_into_tensor_out", "all_gather_into_tensor_coalesced"),
        ],
        ("all_gather", _all_gather),
    ),
    **dict.fromkeys(
        [
            *("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"),
            *("reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"),
        ],
        ("reduce_scatter", _reduce_scatter),
    ),
    "alltoall_base_": ("all_to_all", _all_to_all),
    "all_to_all_single": ("all_to_all", _all_to_all),
    "alltoall_": ("all_to_all", _all_to_all_list),
    "send": ("send", _send),
    "broadcast_": ("broadcast", _from_root),
    "broadcast": ("broadcast", _from_root),
    "scatter_": ("scatter", _from_root),
    "reduce_": ("reduce", _to_root),
    "gather_": ("gather", _to_root),
}
