"""Checkpoints written while steps go on are those that steps would have waited for."""

import json
import signal
from pathlib import Path

import pytest

from moesys.checkpoint.folder import step_folders
from moesys.checkpoint.manifest import read_manifest
from tests.train.launched import STEPS, finish, overrides, records, run, start, wait_for_step

SAVES = [5, 10, 15, 20, STEPS]


@pytest.fixture(scope="module")
def both(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run with asynchronous saves and with others."""
    folders = []
    for asynchronous in ("true", "false"):
        folder = tmp_path_factory.mktemp("runs") / asynchronous
        mode = [f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep_last=9"]
        run(2, overrides(folder, tiny_data, *mode))
        folders.append(folder)
    return folders[0], folders[1]


def contents(step: Path) -> dict[str, list[tuple[object, str]]]:
    """Of every tensor, ranks' random states included: where its chunks are and their hashes."""
    return {
        name: [(chunk.region, chunk.xxh3_128) for chunk in record.chunks]
        for name, record in read_manifest(step).tensors.items()
    }


def test_every_checkpoint_is_bitwise_the_one_that_steps_waited_for(both):
    background, waited = (step_folders(folder / "checkpoints") for folder in both)
    assert [path.name for path in background] == [path.name for path in waited]
    assert len(background) == len(SAVES)
    for ours, theirs in zip(background, waited, strict=True):
        assert contents(ours) == contents(theirs)
        states = [read_manifest(path).state for path in (ours, theirs)]
        for state in states:
            state["last_eval"] = state["last_eval"].get("val_loss")
            assert state.pop("wall_s") > 0
            assert state.pop("tokens_per_s") > 0
        assert states[0] == states[1]


def test_they_are_recorded_when_they_are_on_the_disk(both):
    for folder in both:
        saves = records(folder, "checkpoint")
        assert [r["step"] for r in saves] == SAVES
        assert all(r["checkpoint_ms"] > 0 and r["save_ms"] > 0 and r["bytes"] > 0 for r in saves)
    lines = (both[0] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines][-3:] == ["checkpoint", "goodput", "stop"]


@pytest.mark.chaos
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_told_and_the_last_one_must_be(asynchronous, tiny_data, tmp_path):
    """Training goes on without a checkpoint, but does not end as if it had one."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").write_text("no folder")
    more = ["train.steps=12", f"checkpoint.asynchronous={asynchronous}"]
    code, output = finish(start(2, overrides(folder, tiny_data, *more)))
    assert code != 0
    failed = [record["reason"] for record in records(folder, "checkpoint_failed")]
    assert [reason.partition(" in ")[0] for reason in failed] == [
        f"cannot save step {step}" for step in (5, 10)
    ], output
    for reason in failed:
        assert f"warning: {reason}\nTraining goes on without it" in output
    (stop,) = records(folder, "stop")
    assert stop["reason"].startswith("failed: cannot save step 12 in"), output
    assert stop["step"] == 12


def test_sigterm_waits_for_the_save(tiny_data, tmp_path):
    folder = tmp_path / "run"
    process = start(2, overrides(folder, tiny_data, "train.steps=4000", "checkpoint.every_steps=0"))
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGTERM)
    finish(process)
    (stop,) = records(folder, "stop")
    (saved,) = records(folder, "checkpoint")
    assert saved["step"] == stop["step"]
    assert [path.name for path in step_folders(folder / "checkpoints")] == [
        f"step_{stop['step']:08d}"
    ]
