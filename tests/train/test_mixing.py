"""Weights that follow the router: decided when due, from what is recorded, and again the same wherever a run was cut."""

import pytest

from moesys.cli import main
from moesys.config.compose import compose
from moesys.config.validate import warnings
from moesys.data.router_load import distances, updated_weights
from tests.train.launched import (
    SAME_ON_ANY_RANKS,
    finish,
    kill_all,
    records,
    run,
    source_overrides,
    start,
    wait_for_step,
)

POLICY = [
    "data.mixing.policy=router_load",
    *("data.mixing.every_steps=4", "data.mixing.tokens=320", "data.mixing.distance=l2"),
    *("schedule=constant", "schedule.warmup_steps=2", "train.eval_every_steps=2"),
]


def exact(folder):
    keys = ("step", "loss", "grad_norm", "expert_load", "tokens_by_source", "weight_by_source")
    train = [{key: record[key] for key in keys} for record in records(folder, "train")]
    return train, mixings(folder)


def mixings(folder):
    keys = ("step", "weight_by_source", "load_by_source", "distance_by_source")
    return [{key: record[key] for key in keys} for record in records(folder, "mixing")]


def train(folder, data, prose, *steps: int) -> None:
    words = source_overrides(folder, data, prose, *POLICY)
    for number in steps:
        # Layers of multi-token prediction see no data that weights are decided by.
        more = ["parallel.ep=1", "checkpoint.every_steps=0", "model.mtp_depth=1"]
        assert main(["train", *words, *more, f"train.steps={number}"]) == 0


@pytest.mark.parity
def test_a_run_that_was_cut_decides_the_same(tiny_data, tiny_prose, tmp_path):
    """Where an update is due, and where none is."""
    train(tmp_path / "whole", tiny_data, tiny_prose, 10)
    train(tmp_path / "cut", tiny_data, tiny_prose, 4, 6, 10)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


def test_weights_follow_the_router(tiny_data, tiny_prose, tmp_path):
    train(tmp_path, tiny_data, tiny_prose, 10)
    whole, updates = exact(tmp_path)
    assert [update["step"] for update in updates] == [5, 9]
    weights = {"code": 0.7, "prose": 0.3}
    for update in updates:
        loads = list(update["load_by_source"].values())
        assert [sum(load_E) for load_E in loads] == [2 * 320] * 2
        expected = updated_weights(
            [*weights.values()], loads, eta=10.0, smoothing=0.05, distance="l2"
        )
        weights = update["weight_by_source"]
        assert [*weights.values()] == pytest.approx(expected, abs=1e-6)  # of whole parts
        assert list(update["distance_by_source"].values()) == distances(loads, "l2")
    assert len({tuple(update["weight_by_source"].values()) for update in updates}) == 2
    for record, (first, code, told) in zip(
        whole,
        [(0, 0, {"code": 0.7, "prose": 0.3})] * 4
        + [(4, whole[3]["tokens_by_source"]["code"], updates[0]["weight_by_source"])] * 4
        + [(8, whole[7]["tokens_by_source"]["code"], updates[1]["weight_by_source"])] * 2,
        strict=True,
    ):
        assert record["weight_by_source"] == told
        read = record["tokens_by_source"]["code"] - code
        assert abs(read - told["code"] * 512 * (record["step"] - first)) < 32


@pytest.mark.parity
def test_a_killed_run_goes_on_exactly_and_other_ranks_with_the_same_samples(
    tiny_data, tiny_prose, tmp_path
):
    words = [*POLICY, "train.steps=14", "checkpoint.every_steps=3"]
    run(2, source_overrides(tmp_path / "whole", tiny_data, tiny_prose, *words))
    killed = source_overrides(tmp_path / "killed", tiny_data, tiny_prose, *words)
    process = start(2, [*killed, "train.steps=4000"])
    wait_for_step(process, tmp_path / "killed", 10)
    kill_all(process)
    finish(process)
    # More steps than the whole run may have been made: what is after a checkpoint is made again.
    last = records(tmp_path / "killed", "checkpoint")[-1]["step"]
    run(2, [*killed, f"train.steps={max(14, last + 1)}"])
    train, updates = exact(tmp_path / "killed")
    assert (train[:14], updates[:3]) == exact(tmp_path / "whole")


@pytest.mark.parity
def test_other_ranks_decide_the_same(tiny_data, tiny_prose, tmp_path):
    words = [*POLICY, *SAME_ON_ANY_RANKS, "parallel.ep=1"]
    whole = source_overrides(tmp_path / "whole", tiny_data, tiny_prose, *words)
    assert main(["train", *whole, "train.steps=10"]) == 0
    cut = source_overrides(tmp_path / "cut", tiny_data, tiny_prose, *words)
    run(2, [*cut, "train.steps=6", "parallel.ep=2"])
    run(2, [*cut, "train.steps=10", "parallel.tp=2"])
    assert mixings(tmp_path / "cut") == mixings(tmp_path / "whole")
    read = [
        [r["tokens_by_source"] for r in records(tmp_path / n, "train")] for n in ("cut", "whole")
    ]
    assert read[0] == read[1]


def test_what_nothing_reads_is_told():
    config = compose(["data.mixing.eta=3", "data=mixed"])
    assert warnings(config, 1) == [
        "data.mixing.eta=3.0 has no effect with data.mixing.policy=fixed"
    ]
    config = compose(["data=mixed", "data.mixing.policy=router_load"])
    assert warnings(config, 1) == [
        "data.mixing.every_steps=100 is not below train.steps=100: the weights stay as they are"
    ]
