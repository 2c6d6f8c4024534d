"""A run on documents of any length: it learns, says how its steps were planned, and goes on exactly, also on other ranks."""

import json
import signal
from itertools import pairwise

import numpy as np
import pytest

from moesys.config.compose import compose
from moesys.train.batches import build_loader
from tests.data.files import write_tokens
from tests.train.launched import (
    SAME_ON_ANY_RANKS,
    STEPS,
    finish,
    overrides,
    records,
    run,
    start,
    wait_for_step,
)

PLANNED = ("batch=hdp", "data.seq_len=256", "train.global_batch_tokens=1024")
EXACT = ("step", "tokens", "loss", "grad_norm", "sequences", "micro_steps", "planned_ms")


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(4, overrides(folder, tiny_data, *PLANNED))
    return folder


def exact(folder):
    return [{key: r[key] for key in EXACT} for r in records(folder, "train")]


def test_records_say_how_steps_were_planned(uninterrupted):
    steps = records(uninterrupted, "train")
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    tokens = [0, *(r["tokens"] for r in steps)]
    of_steps = [after - before for before, after in pairwise(tokens)]
    assert max(of_steps) <= 1024
    assert min(of_steps) > 1024 - 256, "only a sequence that does not fit is left for the next"
    assert len(set(of_steps)) > 1
    for r in steps:
        assert r["sequences"] >= 4
        assert r["micro_steps"] >= 2
        assert r["planned_ms"] > 0
        assert 0 <= r["planned_idle"] < 1
        assert r["tokens_per_s"] > 0
    (began,) = records(uninterrupted, "start")
    costs = began["batch_costs"]
    assert costs["token_s"] > 0
    assert costs["attention"][0]["pair_s"] > 0
    kept = json.loads((uninterrupted / "batch_costs.json").read_text())
    assert kept["costs"] == costs
    assert len({r["val_tokens"] for r in records(uninterrupted, "eval")}) == 1
    assert 0 < records(uninterrupted, "eval")[0]["val_tokens"] <= 256


def test_a_stopped_run_goes_on_exactly(uninterrupted, tiny_data, tmp_path):
    folder = tmp_path / "stopped"
    folder.mkdir()
    # Another start would time pieces anew, and might plan otherwise.
    (folder / "batch_costs.json").write_text((uninterrupted / "batch_costs.json").read_text())
    process = start(4, overrides(folder, tiny_data, *PLANNED))
    wait_for_step(process, folder, 12)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert 12 <= records(folder, "stop")[0]["step"] < STEPS
    run(4, overrides(folder, tiny_data, *PLANNED))
    assert len(records(folder, "start")) == 2
    assert exact(folder) == exact(uninterrupted)


@pytest.mark.parametrize(
    "policy", ["naive", pytest.param("karmarkar_karp", marks=pytest.mark.parity)]
)
def test_other_ranks_and_policies_train_on_the_same(tiny_data, tmp_path, policy):
    words = [*PLANNED, *SAME_ON_ANY_RANKS, "batch.costs=formula"]
    folders = [tmp_path / name for name in ("one", "two")]
    run(4, overrides(folders[0], tiny_data, *words))
    process = start(4, overrides(folders[1], tiny_data, *words))
    wait_for_step(process, folders[1], 8)
    process.send_signal(signal.SIGTERM)
    finish(process)
    run(2, overrides(folders[1], tiny_data, *words, f"batch.policy={policy}"))
    assert [r["world_size"] for r in records(folders[1], "start")] == [4, 2]
    ours, theirs = (records(folder, "train") for folder in folders)
    assert [r["tokens"] for r in ours] == [r["tokens"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    assert [r["micro_steps"] for r in ours] != [r["micro_steps"] for r in theirs]


@pytest.mark.parametrize(
    ("words", "waits"),
    [
        ("", False),
        ("parallel.tp=2 parallel.etp=2", False),
        ("balance=aux_sequence", False),
        ("parallel.ep=2", True),
        ("parallel.etp=2", True),
        ("parallel.pp=2", True),
        ("parallel.zero=1", True),
        ("balance=aux_global", True),
    ],
)
def test_ranks_leave_out_micro_steps_where_none_waits_for_them(tmp_path, words, waits) -> None:
    lengths = np.random.default_rng(0).integers(2, 250, 100).tolist()
    data = tmp_path / "data"
    data.mkdir()
    write_tokens(data / "train", [[0] * length for length in lengths])
    own = ["parallel.ep=1", "balance=none", "batch.policy=naive", "batch.plan_ahead_steps=0"]
    sizes = ["train.micro_batch_tokens=128", f"data.path={data}"]
    config = compose(
        ["experiment=quickstart", "model=tiny", *sizes, *PLANNED, *own, *words.split()]
    )
    loaders = [build_loader(config, rank, 4) for rank in range(4)]
    steps = [[len(loader.next_step().micro_batches) for loader in loaders] for _ in range(8)]
    assert all(len(set(numbers)) == 1 for numbers in steps) == waits


def test_what_does_not_go_is_refused_before_it_costs(tiny_data, tmp_path):
    words = ("data.seq_len=600", "parallel.cp=2", "train.global_batch_tokens=512")
    code, output = finish(start(4, overrides(tmp_path / "run", tiny_data, *PLANNED, *words)))
    assert code != 0
    for said in (
        "batch.policy='hdp' lays a sequence over any number of data ranks, and parallel.cp=2 over a fixed one",
        "lies on 5 ranks of train.micro_batch_tokens=128, and there are dp=2 data ranks",
        "must be at least data.seq_len=600",
    ):
        assert said in output, output
    assert not (tmp_path / "run").exists()
