"""Stopped or killed at any point and started again, a run has the bitwise same losses."""

import json
import signal
import time

import pytest

from moesys.train.exit_codes import STOPPED_EXIT_CODE
from tests.train.launched import (
    STEPS,
    finish,
    kill_all,
    one_rank,
    overrides,
    records,
    run,
    start,
    wait_for_step,
)

EXACT = (
    "step",
    "tokens",
    "loss",
    "aux_loss",
    "z_loss",
    "lr",
    "grad_norm",
    "expert_load",
    "sent_bytes",
    "between_nodes_bytes",
)


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    output = run(2, overrides(folder, tiny_data))
    return folder, output


def exact(folder):
    """What must not depend on interruptions: floats compare bit for bit."""
    train = [{key: r[key] for key in EXACT} for r in records(folder, "train")]
    evals = [(r["step"], r["val_loss"], r["val_tokens"]) for r in records(folder, "eval")]
    return train, evals


def test_a_run_leaves_its_records(uninterrupted):
    folder, output = uninterrupted
    assert [r["step"] for r in records(folder, "train")] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records(folder, "eval")] == [10, 20, STEPS]
    assert [r["step"] for r in records(folder, "checkpoint")] == [5, 10, 15, 20, STEPS]
    assert records(folder, "train")[-1]["loss"] < records(folder, "train")[0]["loss"]
    assert records(folder, "train")[0]["sent_bytes"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    for key in (
        "val_bits_per_byte",
        "unigram_bits_per_byte",
        "tokens_per_s",
        "wall_s",
        "world_size",
        "parameters",
        "active_parameters",
    ):
        assert summary[key] > 0, key
    assert summary["status"] == "done"
    assert (folder / "config.yaml").exists()
    # The backend is said at start-up, with the reason.
    assert "grouped_mm (set by model.moe.expert_backend)" in output
    # keep_last = 2
    assert len(list((folder / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize("step", [12])
def test_sigterm_saves_and_the_next_start_goes_on(uninterrupted, tiny_data, tmp_path, step):
    folder = tmp_path / "stopped"
    process = start(2, overrides(folder, tiny_data))
    wait_for_step(process, folder, step)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0, "a job that is not done must not look done"
    stopped = records(folder, "stop")[0]
    assert stopped["reason"] == "stopped", output
    assert step <= stopped["step"] < STEPS
    assert records(folder, "checkpoint")[-1]["step"] == stopped["step"]
    run(2, overrides(folder, tiny_data))
    assert records(folder, "start")[1]["resumed_from_step"] == stopped["step"]
    assert exact(folder) == exact(uninterrupted[0])


@pytest.mark.parity
@pytest.mark.parametrize("step", [2, 13])
def test_kill_9_of_all_ranks_loses_nothing_but_time(uninterrupted, tiny_data, tmp_path, step):
    folder = tmp_path / "killed"
    process = start(2, overrides(folder, tiny_data))
    wait_for_step(process, folder, step)
    kill_all(process)
    finish(process)
    run(2, overrides(folder, tiny_data))
    assert records(folder, "start")[1]["resumed_from_step"] <= step
    assert exact(folder) == exact(uninterrupted[0])


def test_a_finished_run_started_again_does_nothing_more(uninterrupted, tiny_data):
    folder, _ = uninterrupted
    before, summary = exact(folder), (folder / "summary.json").read_text()
    run(2, overrides(folder, tiny_data))
    assert exact(folder) == before
    assert (folder / "summary.json").read_text() == summary


def test_a_fresh_start_beside_old_checkpoints_is_refused(uninterrupted, tiny_data):
    folder, _ = uninterrupted
    before = exact(folder)
    code, output = finish(start(1, overrides(folder, tiny_data, "checkpoint.resume=false")))
    assert code != 0
    assert "checkpoint.resume" in output
    assert "set another run.dir" in output
    assert exact(folder) == before


@pytest.mark.parity
def test_a_measured_backend_is_kept_and_a_set_one_obeyed(tiny_data, tmp_path):
    folder = tmp_path / "run"
    few = ["parallel.ep=1", "schedule.warmup_steps=2", "train.steps=6"]
    run(1, overrides(folder, tiny_data, *few, "model.moe.expert_backend=auto"))
    (first,) = records(folder, "start")
    assert "measured" in first["expert_backend_reason"]
    # As if the first start had measured the other way round.
    other = "loop" if first["expert_backend"] == "grouped_mm" else "grouped_mm"
    path = folder / "expert_backend.json"
    path.write_text(path.read_text().replace(first["expert_backend"], other))
    for step, setting, expected in (
        (7, "auto", other),
        (8, first["expert_backend"], first["expert_backend"]),
    ):
        more = ["parallel.ep=1", "schedule.warmup_steps=2", f"train.steps={step}"]
        run(1, overrides(folder, tiny_data, *more, f"model.moe.expert_backend={setting}"))
        assert records(folder, "start")[-1]["expert_backend"] == expected
        assert records(folder, "start")[-1]["resumed_from_step"] == step - 1


@pytest.mark.chaos
def test_two_jobs_in_one_folder_are_refused(tiny_data, tmp_path):
    folder = tmp_path / "shared"
    arguments = overrides(folder, tiny_data, "parallel.ep=1", "train.steps=4000")
    first = start(1, arguments)
    wait_for_step(first, folder, 1)
    code, output = finish(start(1, arguments))
    kill_all(first)
    finish(first)
    assert code != 0
    assert f"run.dir={folder} is in use by another job" in output


@pytest.mark.chaos
def test_a_rank_that_dies_takes_the_job_with_it_soon(tiny_data, tmp_path):
    folder = tmp_path / "run"
    process = start(2, overrides(folder, tiny_data, "train.steps=4000"))
    wait_for_step(process, folder, 3)
    one_rank(process, 1).kill()
    began = time.monotonic()
    code, output = finish(process)
    assert time.monotonic() - began < 10
    assert code not in (0, STOPPED_EXIT_CODE), output
    stop = records(folder, "stop")[-1]
    assert stop["reason"].startswith("failed:"), "the survivor says why it left"
    assert stop["step"] >= 3


@pytest.mark.chaos
def test_time_in_checkpoints_is_recorded_though_steps_are_not(tiny_data, tmp_path):
    folder = tmp_path / "run"
    few = ["parallel.ep=1", "schedule.warmup_steps=2", "train.steps=13"]
    few += ["train.log_every_steps=4", "checkpoint.asynchronous=false"]
    run(1, overrides(folder, tiny_data, *few))
    saves = {r["step"]: r["checkpoint_ms"] for r in records(folder, "checkpoint")}
    waited = {r["step"]: r["checkpoint_ms"] for r in records(folder, "train")}
    assert waited == {4: 0.0, 8: saves[5], 12: saves[10]}
