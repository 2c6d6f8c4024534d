"""Every kind of fault in a real job of two ranks: found, named, back in time, and the same bits as without it."""

import re
from pathlib import Path

import pytest

from moesys.chaos.faults import PHASES
from moesys.chaos.job import Watched
from moesys.chaos.outcome import Event
from moesys.checkpoint.folder import step_folders
from moesys.checkpoint.verify import verify
from tests.chaos.survival import (
    HANG_BACK_S,
    HANG_FOUND_S,
    KILL_BACK_S,
    KILL_FOUND_S,
    SLOWNESS,
    assert_exact,
    assert_in_time,
    assert_restarted,
    command,
    disturbed,
    named,
    output,
    step_of,
    undisturbed,
)
from tests.train.launched import STEPS, records

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600 * SLOWNESS)]
STEP = 14
"""Checkpoints are made every 5 steps; the one of step 10 may still be on its way."""
BEFORE = (5, 10)
LONG_STEPS = 160
LONG = f"train.steps={LONG_STEPS}"


@pytest.fixture(scope="module")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return undisturbed(command(tiny_data), tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def long(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Without faults, for those that last longer than the short job."""
    job = command(tiny_data, LONG)
    return undisturbed(job, tmp_path_factory.mktemp("long") / "run")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_killed(phase: str, rank: int, plain: Watched, tiny_data: Path, tmp_path: Path) -> None:
    fault = f"kill rank={rank} step={STEP} phase={phase}"
    watched = disturbed(command(tiny_data), tmp_path / "run", fault)
    step = step_of(watched)
    # A save is written while steps go on.
    said = named(watched, rf"^moesys: rank {rank} died at step (\d+) \(last seen at \S+:\d+ ")
    assert step <= said <= step + 2 * (phase == "save")
    assert watched.outcomes[0].restarts == 1
    assert_restarted(watched, BEFORE)
    assert_exact(watched, plain)
    assert_in_time(watched, found_s=KILL_FOUND_S, back_s=KILL_BACK_S)


def test_torchrun_is_killed(long: Watched, tiny_data: Path, tmp_path: Path) -> None:
    """Twice in one job, long enough that its ranks, which train on until they see it, are not done before."""
    fault = "agent rank=1 step=14 phase=forward; agent rank=0 step=90 phase=save"
    watched = disturbed(command(tiny_data, LONG), tmp_path / "run", fault)
    said = output(watched)
    named(
        watched,
        r"^moesys: rank [01] lost its launcher at step (\d+): torchrun, process \d+, is gone",
    )
    for number in (1, 2):
        assert re.search(
            rf"^run\.sh: torchrun .* was ended by signal 9; .* {number} of 2$", said, re.M
        )
    assert_restarted(watched, range(5, 90), range(60, LONG_STEPS))
    assert_exact(watched, long)
    assert_in_time(watched, found_s=KILL_FOUND_S, back_s=KILL_BACK_S)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("phase", "asynchronous"), [("forward", "true"), ("save", "true"), ("save", "false")]
)
def test_stopped(
    phase: str, asynchronous: str, rank: int, plain: Watched, tiny_data: Path, tmp_path: Path
) -> None:
    job = command(tiny_data, f"checkpoint.asynchronous={asynchronous}")
    watched = disturbed(job, tmp_path / "run", f"stop rank={rank} step={STEP} phase={phase}")
    other = 1 - rank
    said = named(
        watched, rf"^moesys: rank {other} gave up at step (\d+): .*; rank {rank} is silent for"
    )
    assert step_of(watched) <= said <= step_of(watched) + 2 * (phase == "save")
    assert f"rank {rank} is stopped, it is killed" in output(watched)
    assert watched.outcomes[0].restarts == 1
    assert_restarted(watched, BEFORE)
    assert_exact(watched, plain)
    assert_in_time(watched, found_s=HANG_FOUND_S, back_s=HANG_BACK_S)


def test_an_error_in_a_step(plain: Watched, tiny_data: Path, tmp_path: Path) -> None:
    fault = f"exception rank=1 step={STEP} phase=forward"
    watched = disturbed(command(tiny_data), tmp_path / "run", fault)
    assert (
        named(watched, r"^moesys: rank 1 failed at step (\d+): ChaosError: chaos: exception")
        == STEP
    )
    assert_restarted(watched, BEFORE)
    assert_exact(watched, plain)
    assert_in_time(watched, found_s=KILL_FOUND_S, back_s=KILL_BACK_S)


def test_an_error_in_a_save_is_told_and_training_goes_on(
    plain: Watched, tiny_data: Path, tmp_path: Path
) -> None:
    fault = f"exception rank=1 step={STEP} phase=save"
    watched = disturbed(command(tiny_data), tmp_path / "run", fault)
    (failed,) = records(watched.run_dir, "checkpoint_failed")
    assert failed["reason"].startswith("cannot save step 15")
    assert "rank 1" in failed["reason"]
    assert "ChaosError" in failed["reason"]
    assert len(records(watched.run_dir, "start")) == 1
    assert_exact(watched, plain)


def test_slow(plain: Watched, tiny_data: Path, tmp_path: Path) -> None:
    fault = f"slow rank=1 step={STEP} phase=forward seconds=2"
    watched = disturbed(command(tiny_data), tmp_path / "run", fault)
    assert len(records(watched.run_dir, "start")) == 1
    assert watched.outcomes[0].steps_lost == 0
    assert_exact(watched, plain)


@pytest.mark.parametrize("kind", ["disk_full", "read_only"])
def test_a_disk_that_takes_nothing(
    kind: str, long: Watched, tiny_data: Path, tmp_path: Path
) -> None:
    """Training goes on, the checkpoints from before stay whole, and later ones are made again."""
    run_dir = tmp_path / "run"
    seen: list[tuple[str, list[str]]] = []

    def look(event: Event) -> None:
        # The file system goes with the job.
        if event.kind == "said":
            seen.extend((f.name, verify(f)) for f in step_folders(run_dir / "checkpoints"))

    sizes = [record["bytes"] for record in records(long.run_dir, "checkpoint")]
    watched = disturbed(
        command(tiny_data, LONG),
        run_dir,
        f"{kind} rank=0 step={STEP} seconds=1",
        checkpoint_bytes=max(sizes),
        on_event=look,
    )
    failed = records(run_dir, "checkpoint_failed")
    assert failed
    assert failed[0]["reason"].startswith("cannot save step 15")
    assert str(run_dir / "checkpoints") in failed[0]["reason"]
    if kind == "disk_full":
        assert re.search(
            r"It needs [\d,]+ bytes, [\d,]+ are free\. Earlier checkpoints are untouched",
            failed[0]["reason"],
        ), failed
    assert seen
    assert {problem for _, problems in seen for problem in problems} == set()
    assert "step_00000010" in {name for name, _ in seen}
    saved = [record["step"] for record in records(run_dir, "checkpoint")]
    assert saved[:2] == [5, 10]
    assert saved[-1] == LONG_STEPS
    assert len(records(run_dir, "start")) == 1
    assert_exact(watched, long)


def test_a_damaged_checkpoint(plain: Watched, tiny_data: Path, tmp_path: Path) -> None:
    fault = f"corrupt_checkpoint rank=1 step={STEP} phase=forward"
    watched = disturbed(command(tiny_data), tmp_path / "run", fault)
    assert named(watched, r"^moesys: rank 1 died at step (\d+) ") == STEP
    assert_restarted(watched, (0, 5))
    (note,) = records(watched.run_dir, "start")[1]["notes"]
    assert re.match(r"skipped step_0000(0005|0010): ", note)
    assert_exact(watched, plain)
    assert_in_time(watched, found_s=KILL_FOUND_S, back_s=KILL_BACK_S)


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_not_a_number(policy: str, plain: Watched, tiny_data: Path, tmp_path: Path) -> None:
    """Which batches it trains on afterwards are other ones, so losses are the undisturbed ones up to the fault."""
    job = command(tiny_data, f"anomaly.policy={policy}")
    watched = disturbed(job, tmp_path / "run", f"nan rank=1 step={STEP}")
    (anomaly,) = records(watched.run_dir, "anomaly")
    assert (anomaly["step"], anomaly["action"]) == (STEP, policy)
    assert len(records(watched.run_dir, "start")) == 1
    assert watched.outcomes[0].found_by == "record of kind anomaly"
    steps = set(range(1, STEPS + 1)) - ({STEP} if policy == "skip" else set())
    assert {record["step"] for record in records(watched.run_dir, "train")} == steps
    kept = STEP if policy == "skip" else anomaly["to_step"] + 1
    assert kept > 5
    for step in range(1, kept):
        assert watched.losses[step] == plain.losses[step]


def test_four_ranks_of_which_one_dies_and_one_has_a_wrong_bit(
    tiny_data: Path, tmp_path: Path
) -> None:
    """With three others that agree, the rank with the bit is known; what it trained with is not kept."""
    job = command(tiny_data, "anomaly.replicas_every_steps=1", nproc=4)
    without = undisturbed(job, tmp_path / "plain")
    faults = f"kill rank=3 step=8 phase=exchange; bit_flip rank=2 step={STEP + 3} phase=forward"
    watched = disturbed(job, tmp_path / "run", faults)
    assert named(watched, r"^moesys: rank 3 died at step (\d+) ") == 8
    assert (
        named(
            watched,
            r"step (\d+): replicas differ: rank 2 \(node \S+\) holds other bits than ranks ",
        )
        == STEP + 3
    )
    assert [outcome.restarts for outcome in watched.outcomes] == [1, 1]
    assert_exact(watched, without)
