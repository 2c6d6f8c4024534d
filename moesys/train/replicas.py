"""Silent corruption: what several ranks hold alike, bit for bit, is hashed and compared.

Replicas get the same update from the same numbers, so they stay equal to the last bit; where they do not, a memory, a
link or an arithmetic unit has failed without a word. Which ranks hold what alike is known as for a checkpoint: a plain
tensor is the same on all ranks that have it, a DTensor's shard on all ranks that have the same box of the whole. That
covers copies of dp, norms and routers over tp, HSDP copies, experts over edp, and their optimizer state. A shard that one
rank alone holds cannot be compared.

A check reads every local tensor once and gathers 16 bytes per kind of placement and rank; only after a difference are
hashes of single tensors gathered.
"""

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesys.ops.shard import local_boxes, local_tensor

_CHUNK = 1 << 24
"""8-byte words that a device's checksum widens at a time."""
_NAMES_TOLD = 3

Hashes = Mapping[str, int]
"""What is held (a name and its box, or a digest of many) -> hash of its bits."""


class ReplicaError(RuntimeError):
    """Ranks hold different bits of what they should hold alike. The same on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Odd:
    """Something that not all of its holders hold alike."""

    what: str
    ranks: tuple[int, ...]
    """Those that differ from most; all holders if there is no majority."""
    others: tuple[int, ...]
    """Those that agree; () without a majority."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check cost."""

    hashed_bytes: int
    """On this rank."""
    seconds: float


def find_odd(hashes_of_ranks: Sequence[Hashes]) -> list[Odd]:
    """All that differs, given what each rank holds, in the order of `what`. Pure."""
    holders: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, hashes in enumerate(hashes_of_ranks):
        for what, value in hashes.items():
            holders[what][rank] = value
    found = []
    for what, value_of in sorted(holders.items()):
        (value, count), *others = Counter(value_of.values()).most_common()
        if not others:
            continue
        has_majority = 2 * count > len(value_of)
        agreeing = tuple(r for r, v in value_of.items() if has_majority and v == value)
        odd = tuple(r for r in value_of if r not in agreeing)
        found.append(Odd(what=what, ranks=odd, others=agreeing))
    return found


def sentence(odd: Sequence[Odd], step: int, nodes: Sequence[str]) -> str:
    """What differs and whose it is, for a person; `nodes` are the names of the ranks' nodes. Pure."""
    ranks = sorted({rank for one in odd for rank in one.ranks})
    others = sorted({rank for one in odd for rank in one.others})
    names = [one.what for one in odd]
    told = ", ".join(names[:_NAMES_TOLD])
    told += f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    if all(one.others for one in odd):
        verb = "hold" if len(ranks) > 1 else "holds"
        blame = f"{_named(ranks, nodes)} {verb} other bits than ranks {_listed(others)}"
        suspects = "them" if len(ranks) > 1 else "it"
    else:
        blame = f"{_named(ranks, nodes)} hold different bits, and no majority says which are right,"
        suspects = "one of them"
    bad = ", ".join(sorted({nodes[rank] for rank in ranks}))
    return (
        f"step {step}: replicas differ: {blame} in {told}. Memory or arithmetic of {suspects} failed silently; nothing "
        f"was saved since. Leave out {bad} (moesys doctor looks for the fault) and start again from the last checkpoint"
    )


class Replicas:
    """The comparisons of one run."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """`nodes`: the name of each rank's node."""
        self._nodes = nodes
        self._compared_step = 0

    def check(self, tensors: Mapping[str, Tensor], step: int) -> float:
        """`check_replicas`, unless it was done at this step or there is one rank; returns its seconds. Collective."""
        if len(self._nodes) == 1 or self._compared_step == step:
            return 0.0
        seconds = check_replicas(tensors, step, self._nodes).seconds
        self._compared_step = step
        return seconds


def check_replicas(tensors: Mapping[str, Tensor], step: int, nodes: Sequence[str]) -> Checked:
    """Compare what ranks hold alike of `tensors` (as `run_tensors` gives them). Collective; the host waits once.

    Raises:
        ReplicaError: the same on all ranks, naming ranks, nodes and tensors.
    """
    began = time.perf_counter()
    hashes, hashed_bytes = hash_tensors(tensors)
    kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
    if find_odd(_gathered(_digests(hashes, kinds))):
        # Each rank tells everything: this happens once in a run's life.
        odd = find_odd(_gathered(hashes))
        assert odd, "digests differ and no tensor does"
        plain = [
            Odd(what=one.what.partition(" ")[0], ranks=one.ranks, others=one.others) for one in odd
        ]
        raise ReplicaError(sentence(plain, step, nodes))
    return Checked(hashed_bytes=hashed_bytes, seconds=time.perf_counter() - began)


def hash_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """ "NAME BOX" -> hash of this rank's part; and the bytes that were read."""
    locals_ = {}
    for name, tensor in tensors.items():
        boxes = local_boxes(tensor)
        assert boxes is not None, f"{name} cannot be in a checkpoint"
        locals_[f"{name} {json.dumps(boxes)}"] = local_tensor(tensor.detach()).contiguous()
    on_device = [what for what, local in locals_.items() if not local.is_cpu]
    sums: list[int] = []
    if on_device:
        sums = torch.stack([device_hash(locals_[what]) for what in on_device]).tolist()
    hashes = dict(zip(on_device, sums, strict=True))
    for what, local in locals_.items():
        if local.is_cpu:
            flat = local.reshape(-1).view(torch.uint8)
            hashes[what] = xxhash.xxh3_64_intdigest(flat.numpy().data)
    return hashes, sum(local.nbytes for local in locals_.values())


def device_hash(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device, without a wait: sum over 8-byte words of word * (2 position + 1), mod 2^64.

    The factors are odd, so a change of one word always changes the sum.
    """
    flat = tensor.reshape(-1).view(torch.uint8)
    padding = -flat.numel() % 8
    words = (torch.nn.functional.pad(flat, (0, padding)) if padding else flat).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK]
        factors = torch.arange(start, start + chunk.numel(), device=tensor.device).mul_(2).add_(1)
        total += factors.mul_(chunk).sum()
    return total


def _kind(tensor: Tensor) -> str:
    """Tensors of one kind have the same holders."""
    if not isinstance(tensor, DTensor):
        return "whole"
    return f"{tensor.device_mesh.mesh_dim_names} {tensor.placements}"


def _digests(hashes: Hashes, kind_of: Mapping[str, str]) -> dict[str, int]:
    """One hash of hashes for each kind; its key says what it is of, so that only equals are compared."""
    members: dict[str, list[str]] = defaultdict(list)
    for what in hashes:
        members[kind_of[what.partition(" ")[0]]].append(what)
    found = {}
    for parts in members.values():
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        values = b"".join((hashes[what] % 2**64).to_bytes(8, "little") for what in parts)
        found[key] = xxhash.xxh3_64_intdigest(values)
    return found


def _gathered(hashes: Hashes) -> list[Hashes]:
    gathered: list[Hashes] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, dict(hashes))
    return gathered


def _named(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    return ", ".join(f"rank {rank} (node {nodes[rank]})" for rank in ranks)


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown
