"""Each kind of call counts what its convention says, once, wherever it runs; an unknown one is an error."""

import warnings
from fractions import Fraction

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from moesys.parallel.dims import ParallelDims
from moesys.parallel.mesh import build_meshes
from moesys.profile.traffic import RULES, SILENT, TrafficCounter, group_names
from moesys.testing.ranks import run_ranks

SIZE = 3
ELEMENTS = 6
NBYTES = 4 * ELEMENTS


def calls(rank: int, size: int) -> dict[str, list[tuple[str, Fraction]]]:
    """What each call of three ranks counts, of tensors of NBYTES that every rank has."""
    x = torch.ones(ELEMENTS)
    out = torch.zeros(size * ELEMENTS)
    parts = [*out.chunk(size)]
    wide = torch.ones(size * ELEMENTS)
    splits = [[1, 2, 3], [0, 1, 5], [6, 0, 0]]
    received = [splits[source][rank] for source in range(size)]

    def send_on() -> None:
        work = dist.isend(x, (rank + 1) % size)
        dist.recv(parts[0], (rank - 1) % size)
        assert work is not None
        work.wait()

    made = {
        "all_reduce": lambda: dist.all_reduce(x.clone()),
        "all_reduce_later": lambda: dist.all_reduce(x.clone(), async_op=True).wait(),
        "all_gather_base": lambda: dist.all_gather_into_tensor(out, x),
        "all_gather_list": lambda: dist.all_gather(parts, x),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(x.clone(), wide),
        "all_to_all": lambda: dist.all_to_all_single(out, wide),
        "all_to_all_uneven": lambda: dist.all_to_all_single(
            torch.zeros(sum(received), 2), torch.ones(6, 2), received, splits[rank]
        ),
        "broadcast": lambda: dist.broadcast(x.clone(), src=1),
        "send": send_on,
        "barrier": dist.barrier,
        "functional": lambda: torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_gather_into_tensor(x, size, dist.group.WORLD.group_name)
        ),
    }
    found = {}
    for name, call in made.items():
        with TrafficCounter() as counter:
            call()
        found[name] = [(kind, t.bytes) for (_, kind), t in counter.sent.items()]
        assert all(ranks == (0, 1, 2) for ranks, _ in counter.sent)
    return found


def test_each_call_counts_by_its_convention():
    uneven = [5, 5, 6]  # of six rows of 8 bytes, those for others
    for rank, found in enumerate(run_ranks(calls, SIZE)):
        all_reduce = ("all_reduce", Fraction(2 * 2 * NBYTES, 3))
        assert found == {
            "all_reduce": [all_reduce],
            "all_reduce_later": [all_reduce],
            "all_gather_base": [("all_gather", 2 * NBYTES)],
            "all_gather_list": [("all_gather", 2 * NBYTES)],
            "reduce_scatter": [("reduce_scatter", 2 * NBYTES)],
            "all_to_all": [("all_to_all", 2 * NBYTES)],
            "all_to_all_uneven": [("all_to_all", 8 * uneven[rank])],
            "broadcast": [("broadcast", 2 * NBYTES if rank == 1 else 0)],
            "send": [("send", NBYTES)],
            "barrier": [],
            "functional": [("all_gather", 2 * NBYTES)],
        }


def hooks(rank: int, size: int) -> dict[str, tuple[int, Fraction]]:
    """A backward of our own, and FSDP's hooks around one."""

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            dist.all_reduce(grad)
            return grad

    model = torch.nn.Linear(8, 8, bias=False)
    dims = ParallelDims(world_size=size, dp_shard=size)
    fully_shard(model, mesh=build_meshes(dims, "cpu").dense["shard"])
    x = torch.ones(2, 8, requires_grad=True)
    with TrafficCounter() as counter:
        model(Summed.apply(x)).sum().backward()
    return {kind: (t.calls, t.bytes) for (_, kind), t in counter.sent.items()}


def test_backward_and_hooks_are_seen():
    for found in run_ranks(hooks, 2):
        assert found == {
            "all_gather": (1, 8 * 8 * 4 / 2),  # the root stays gathered
            "reduce_scatter": (1, 8 * 8 * 4 / 2),
            "all_reduce": (1, 2 * 8 * 4),
        }


def unknown(rank: int, size: int) -> str:
    rule = RULES.pop("allreduce_")
    try:
        with TrafficCounter():
            dist.all_reduce(torch.ones(1))
    except NotImplementedError as error:
        return str(error)
    finally:
        RULES["allreduce_"] = rule
    return "not noticed"


def test_a_call_without_a_convention_is_an_error():
    assert "no convention says what c10d.allreduce_" in run_ranks(unknown, 1)[0]


def names(rank: int, size: int) -> dict[tuple[int, ...], list[str]]:
    return group_names(build_meshes(ParallelDims(world_size=size, tp=2, dp_shard=2), "cpu"))


def test_groups_are_named_by_axis():
    found = run_ranks(names, 4)[0]
    assert found[0, 1] == ["tp", "sequence"]
    assert found[0, 2] == ["shard", "replica"]
    assert found[0, 1, 2, 3] == ["edp_shard", "edp", "stage", "world"]


def test_every_call_that_torch_has_is_known():
    """So that an operator which torch adds is not met in a run first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = torch._C._dispatch_get_all_op_names()
    here = {
        name.partition("::")[2].partition(".")[0] for name in known if name.startswith("c10d::")
    }
    assert here
    assert here - set(RULES) == SILENT & here
