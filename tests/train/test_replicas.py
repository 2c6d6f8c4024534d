"""What ranks hold alike is compared: equal under every layout, and a flipped bit is named with its rank and node."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.config.compose import compose
from moesys.config.schema import ParallelConfig, RunConfig
from moesys.ops.shard import local_tensor
from moesys.parallel.bootstrap import Process
from moesys.testing.layouts import BASE, LAYOUTS
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from moesys.train.replicas import (
    ReplicaError,
    check_replicas,
    device_hash,
    find_odd,
    hash_tensors,
    sentence,
)
from moesys.train.setup import build_run
from moesys.train.signals import StopRequest
from moesys.train.state import run_tensors
from moesys.train.trainer import Trainer
from tests.train.launched import overrides, records

CPU = torch.device("cpu")
PARTS = st.sampled_from("abcde")


@given(st.lists(st.dictionaries(PARTS, st.integers(0, 2)), max_size=6))
def test_odd_ranks_are_those_outside_of_the_majority(hashes_of_ranks):
    found = {odd.what: odd for odd in find_odd(hashes_of_ranks)}
    for what in "abcde":
        value_of = {r: h[what] for r, h in enumerate(hashes_of_ranks) if what in h}
        counts = Counter(value_of.values())
        if len(counts) < 2:
            assert what not in found
            continue
        odd = found[what]
        assert {*odd.ranks, *odd.others} == value_of.keys()
        assert not {*odd.ranks} & {*odd.others}
        majority = [value for value, count in counts.items() if 2 * count > len(value_of)]
        assert {*odd.others} == {r for r, value in value_of.items() if value in majority}


@given(
    size=st.integers(1, 300),
    place=st.integers(0, 10**6),
    bit=st.integers(0, 31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_one_flipped_bit_always_changes_the_device_hash(size, place, bit, dtype):
    tensor = torch.arange(size).to(dtype)
    other = tensor.clone()
    flip(other, place, bit)
    assert device_hash(tensor) != device_hash(other)
    assert device_hash(tensor) == device_hash(tensor.clone())


def test_the_device_hash_knows_order_and_goes_by_chunks(monkeypatch):
    tensor = torch.randn(1000)
    whole = device_hash(tensor)
    assert device_hash(tensor.flip(0)) != whole
    monkeypatch.setattr("moesys.train.replicas._CHUNK", 7)
    assert device_hash(tensor) == whole


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    """One bit of this rank's part."""
    local = local_tensor(tensor.detach())
    flat = local.view(-1).view(torch.uint8)
    flat[(place + bit // 8) % flat.numel()] ^= 1 << bit % 8


def trained(world_size: int, config: RunConfig) -> dict[str, torch.Tensor]:
    """The tensors of a small model after three steps."""
    run = SmallRun(with_micro_steps(config, world_size, 4), world_size)
    for _ in range(3):
        run.step()
    return run_tensors(run.model, run.optimizer)


def message(tensors: dict[str, torch.Tensor], world_size: int) -> str:
    try:
        check_replicas(tensors, 3, [f"node{rank}" for rank in range(world_size)])
    except ReplicaError as error:
        return str(error)
    return ""


def flipped(rank: int, size: int, config: RunConfig, flips: list[tuple[str, int]]) -> list[str]:
    """What is said without a flip, then with each alone: (name, rank of the flip)."""
    tensors = trained(size, config)
    said = [message(tensors, size)]
    for name, at in flips:
        if rank == at:
            flip(tensors[name], 5, 3)
        said.append(message(tensors, size))
        if rank == at:
            flip(tensors[name], 5, 3)
    return said


ROUTER = "model.layers.1.moe.router.weight"
EXPERTS = "model.layers.1.moe.experts.gate_up"
HEAD = "model.head.weight"
BIAS = "model.layers.1.moe.router.selection_bias_E"
STATE = "optim.layers.1.moe.router.weight.exp_avg_sq"


@pytest.mark.parametrize(
    ("size", "degrees", "flips"),
    [
        (4, {}, [(HEAD, 2, "0, 1, 3"), (EXPERTS, 3, "0, 1, 2"), (BIAS, 0, "1, 2, 3")]),
        (4, {"ep": 2}, [(EXPERTS, 2, ""), (ROUTER, 3, "0, 1, 2")]),
        *(
            pytest.param(*case, marks=pytest.mark.parity)
            for case in (
                (2, {"tp": 2}, [(ROUTER, 1, ""), (STATE, 0, ""), (HEAD, 0, "alone")]),
                (4, {"zero": 3, "dp_shard": 2}, [(HEAD, 1, ""), (EXPERTS, 2, "")]),
                (2, {"zero": 3}, [(BIAS, 1, ""), (HEAD, 0, "alone")]),
                (4, {"pp": 2}, [(HEAD, 2, "")]),
            )
        ),
    ],
    ids=["dp", "ep over edp", "tp", "hsdp", "zero", "pp"],
)
def test_a_flipped_bit_is_named(size, degrees, flips):
    """`flips`: a name, the rank of the flip, and the ranks that outvote it; what it holds alone is not compared."""
    config = replace(BASE, parallel=ParallelConfig(**degrees))
    ranks = run_ranks(flipped, size, config, [flip[:2] for flip in flips], timeout_s=240)
    assert all(said == ranks[0] for said in ranks), "the same on all ranks"
    healthy, *said = ranks[0]
    assert healthy == ""
    for (name, rank, others), text in zip(flips, said, strict=True):
        if others == "alone":
            assert text == ""
            continue
        assert text.startswith("step 3: replicas differ: ")
        assert f" in {name}." in text
        whose = f"rank {rank} (node node{rank})"
        assert (
            f"{whose} holds other bits than ranks {others} in" in text if others else whose in text
        )
        assert ("no majority says which are right" in text) == (not others)


@pytest.mark.parametrize(
    "name",
    [
        "pp+tp+ep",
        *(
            pytest.param(name, marks=pytest.mark.parity)
            for name in ("cp", "etp", "zbv", "tp without sequence parallelism")
        ),
    ],
)
def test_replicas_stay_equal_to_the_bit_under_other_layouts(name):
    size, degrees = LAYOUTS[name]
    config = replace(BASE, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    assert run_ranks(flipped, size, config, [], timeout_s=240) == [[""]] * size


def test_every_byte_is_hashed():
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(())}
    hashes, hashed_bytes = hash_tensors(tensors)
    assert hashed_bytes == 12 + 4 + 4
    assert [what.partition(" ")[0] for what in hashes] == ["a", "b", "c"]


def test_many_names_are_counted():
    hashes = {f"t{i}": 0 for i in range(7)}
    odd = find_odd([hashes, hashes, {**hashes, **{f"t{i}": 1 for i in range(5)}}])
    text = sentence(odd, 9, ["a", "b", "c"])
    assert "rank 2 (node c) holds other bits than ranks 0, 1 in t0, t1, t2 and 2 more" in text
    assert "Leave out c" in text


def corrupted(rank: int, size: int, arguments: list[str]) -> str:
    config = compose(arguments)
    process = Process(
        rank=rank,
        world_size=size,
        local_rank=rank,
        device=CPU,
        backend="gloo",
        nodes=("here", "there"),
    )
    trainer = Trainer(build_run(config, process))

    def corrupt(*_: object) -> None:
        if rank == 1 and trainer.step == 8:
            flip(trainer.run.model.get_parameter("embed.weight"), 11, 5)

    trainer.run.optimizer.register_step_post_hook(corrupt)
    try:
        with StopRequest() as stop:
            trainer.train(stop)
    except ReplicaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("every_steps", "found_at"), [(3, 9), pytest.param(100, 10, marks=pytest.mark.chaos)]
)
def test_a_run_ends_at_the_next_comparison_and_saves_no_more(
    tiny_data, tmp_path, every_steps, found_at
):
    """One is made before each checkpoint, here every 5 steps."""
    small = ["parallel.ep=1", "train.eval_every_steps=0", "metrics.peak_tflops=1"]
    more = [*small, f"anomaly.replicas_every_steps={every_steps}"]
    texts = run_ranks(corrupted, 2, overrides(tmp_path, tiny_data, *more), timeout_s=240)
    assert texts[0] == texts[1]
    assert texts[0].startswith(
        f"step {found_at}: replicas differ: rank 0 (node here), rank 1 (node there)"
    )
    assert "model.embed.weight" in texts[0]
    assert [r["step"] for r in records(tmp_path, "checkpoint")] in ([], [5])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert records(tmp_path, "stop")[-1]["reason"].startswith("failed: ")
