"""Faults in a real job of two ranks: each happens at its phase of its step on its rank, once, and nowhere else."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moesys.chaos.acts import flip_bit, problem_here
from moesys.chaos.faults import Fault, parse_faults
from moesys.chaos.inject import MARKERS, VARIABLE, is_due
from moesys.checkpoint.folder import step_folders
from moesys.checkpoint.verify import verify
from tests.train.launched import ROOT, kill_all, overrides, records, run, wait_for_step

TIMEOUT_S = 240


def job(
    run_dir: Path, data: Path, faults: str, *more: str, restarts: int = 0
) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node=2", f"--max-restarts={restarts}", "-m", "moesys.train"]
    words += overrides(run_dir, data, "parallel.ep=2", "train.log_every_steps=1", *more)
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", VARIABLE: faults},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            kill_all(process)
    return process.returncode, output


def markers(run_dir: Path) -> dict[int, dict]:
    paths = sorted((run_dir / MARKERS).glob("*.json"))
    return {int(path.stem): json.loads(path.read_text()) for path in paths}


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir, "train")), default=0)


def test_faults_that_end_nothing_and_then_a_kill(tiny_data: Path, tmp_path: Path) -> None:
    """One job, so that it stays quick: a fault of each phase, the last one SIGKILL."""
    faults = (
        "slow rank=1 step=2 phase=data seconds=0.4; slow rank=0 step=3 phase=forward seconds=0.4; "
        "slow rank=0 step=4 phase=backward seconds=0; stop rank=1 step=5 phase=save seconds=0.4; "
        "partition rank=1 step=7 phase=exchange seconds=0.2; kill rank=0 step=9 phase=exchange"
    )
    run_dir = tmp_path / "run"
    code, output = end(job(run_dir, tiny_data, faults))
    assert code != 0, output
    told = markers(run_dir)
    assert [marker["fault"] for marker in told.values()] == [
        asdict(f) for f in parse_faults(faults)
    ]
    assert [marker["step"] for marker in told.values()] == [2, 3, 4, 5, 7, 9]
    # The marker's process is the rank's: two ranks, each fault in its own.
    pid_of_rank = {marker["fault"]["rank"]: marker["pid"] for marker in told.values()}
    assert all(pid_of_rank[m["fault"]["rank"]] == m["pid"] for m in told.values())
    assert len(set(pid_of_rank.values())) == 2
    # Step 9 was begun and never done; the slow steps took their time, those between did not.
    assert last_step(run_dir) == 8, output
    step_ms = {record["step"]: record["step_ms"] for record in records(run_dir, "train")}
    assert step_ms[2] >= 400
    assert step_ms[3] >= 400
    assert f"chaos: {parse_faults(faults)[5]}: SIGKILL" in output
    assert "rank 0 died" in output or "Signal 9" in output
    times = [marker["monotonic_s"] for marker in told.values()]
    saved_at = times.pop(3)
    assert times == sorted(times)
    assert saved_at > times[2], "a save goes on beside the steps after it"


@pytest.mark.chaos
def test_a_fault_happens_once_per_run_folder(tiny_data: Path, tmp_path: Path) -> None:
    faults = "exception rank=1 step=8 phase=optimizer; slow rank=0 step=1 seconds=0"
    run_dir = tmp_path / "run"
    code, output = end(job(run_dir, tiny_data, faults))
    assert code != 0
    assert "ChaosError: chaos: exception rank=1 step=8 phase=optimizer" in output
    assert last_step(run_dir) == 7
    before = markers(run_dir)
    assert len(before) == 2
    code, output = end(job(run_dir, tiny_data, faults))
    assert code == 0, output
    assert "chaos:" not in output
    assert markers(run_dir) == before
    assert last_step(run_dir) == 24


@pytest.mark.chaos
@pytest.mark.parametrize("phase", ["data", "forward", "exchange", "backward", "optimizer", "save"])
def test_killed_in_every_phase_and_exact_after_a_restart_in_place(
    phase: str, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    code, output = end(job(run_dir, tiny_data, f"kill rank=1 step=13 phase={phase}", restarts=1))
    assert code == 0, output
    (marker,) = markers(run_dir).values()
    assert marker["step"] == (15 if phase == "save" else 13)
    assert len(records(run_dir, "start")) == 2
    plain = tmp_path / "plain"
    run(2, overrides(plain, tiny_data, "parallel.ep=2", "train.log_every_steps=1"))
    losses = [[r["loss"] for r in records(folder, "train")] for folder in (run_dir, plain)]
    assert losses[0] == losses[1]


@pytest.mark.chaos
def test_a_rank_is_stopped_in_its_step(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = job(run_dir, tiny_data, "stop rank=1 step=6 phase=forward", "train.timeout_s=60")
    try:
        wait_for_step(process, run_dir, 5)
        until_s = time.monotonic() + 20
        while not markers(run_dir) and time.monotonic() < until_s:
            time.sleep(0.05)
        (marker,) = markers(run_dir).values()
        time.sleep(2.0)
        status = Path(f"/proc/{marker['pid']}/stat").read_text().rpartition(")")[2].split()
        assert status[0] == "T"
        assert last_step(run_dir) == 5
        os.kill(marker["pid"], signal.SIGCONT)
        wait_for_step(process, run_dir, 7)
    finally:
        kill_all(process)
        process.communicate()


@pytest.mark.chaos
def test_a_bit_of_one_rank(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _, output = end(job(run_dir, tiny_data, "bit_flip rank=1 step=4 phase=data"))
    (marker,) = markers(run_dir).values()
    assert re.fullmatch(r"bit \d+ of [\w.]+ at \[[\d, ]+\]", marker["what"]), output
    assert ".experts." not in marker["what"]
    plain = tmp_path / "plain"
    run(2, overrides(plain, tiny_data, "parallel.ep=2", "train.log_every_steps=1"))
    losses = [
        {r["step"]: r["loss"] for r in records(folder, "train")} for folder in (run_dir, plain)
    ]
    assert [losses[0][step] == losses[1][step] for step in (1, 2, 3, 4)] == [True] * 3 + [False]


@pytest.mark.chaos
def test_not_a_number_in_one_gradient(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _, output = end(job(run_dir, tiny_data, "nan rank=1 step=4"))
    (marker,) = markers(run_dir).values()
    assert (marker["step"], marker["fault"]["rank"]) == (4, 1)
    assert marker["what"].startswith("gradient of ")
    assert "nan" in output or records(run_dir, "anomaly")


@pytest.mark.chaos
def test_a_quota_is_met_while_saving(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    code, output = end(job(run_dir, tiny_data, "disk_full rank=0 step=8 seconds=600"))
    (marker,) = markers(run_dir).values()
    assert (marker["step"], marker["fault"]["phase"]) == (10, "save")
    # Training goes on; only the last save must be there.
    assert last_step(run_dir) == 24
    assert code != 0
    assert "cannot save step 24" in output
    failed = [record["reason"] for record in records(run_dir, "checkpoint_failed")]
    assert [reason.partition(" in ")[0] for reason in failed] == [
        f"cannot save step {step}" for step in (10, 15, 20)
    ]
    assert all("File too large" in reason for reason in failed)
    (left,) = step_folders(run_dir / "checkpoints")
    assert (left.name, verify(left)) == ("step_00000005", [])


@pytest.mark.chaos
def test_a_checkpoint_is_damaged_and_passed_over(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    faults = "corrupt_checkpoint rank=0 step=13"
    code, output = end(job(run_dir, tiny_data, faults, restarts=1))
    assert code == 0, output
    (marker,) = markers(run_dir).values()
    assert "step_00000010/shard-" in marker["what"]
    assert [record["resumed_from_step"] for record in records(run_dir, "start")] == [0, 5]
    assert last_step(run_dir) == 24


@pytest.mark.chaos
def test_what_could_never_happen_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    faults = "kill rank=2 step=3; slow rank=0 step=90; read_only rank=0 step=4"
    code, output = end(job(tmp_path / "run", tiny_data, faults))
    assert code != 0
    assert f"{VARIABLE}: 3 problems" in output
    for said in ("rank must be below 2", "at most train.steps=24", "is no file system of its own"):
        assert said in output
    assert not markers(tmp_path / "run")


def test_a_rank_that_torchrun_did_not_start_has_no_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fault,) = parse_faults("agent rank=0 step=1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert "start the job with launch/run.sh" in (problem_here(fault, tmp_path) or "")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert problem_here(fault, tmp_path) is None


@pytest.mark.chaos
def test_nothing_of_it_is_imported_where_no_fault_is_asked_for() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['moesys.train', 'train.steps=0']\n"  # refused, after all imports
        "try: runpy.run_module('moesys.train', run_name='__main__')\n"
        "except SystemExit as stopped: assert stopped.code == 2, stopped.code\n"
        "print(sorted(name for name in sys.modules if name.startswith('moesys.chaos')))"
    )
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    for faults, expected in ((None, False), ("kill rank=0 step=1", True)):
        armed = environment if faults is None else environment | {VARIABLE: faults}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=armed, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert ("moesys.chaos.inject" in done.stdout) == expected, done.stdout


def test_when_a_fault_is_due() -> None:
    forward = Fault(kind="kill", rank=0, step=4, phase="forward")
    assert [is_due(forward, step) for step in (3, 4, 5)] == [False, True, False]
    save = Fault(kind="kill", rank=0, step=4, phase="save")
    assert [is_due(save, step) for step in (3, 4, 5)] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_is_flipped(dtype: torch.dtype) -> None:
    bits = 8 * dtype.itemsize
    for bit in range(bits):
        tensor = torch.ones(3, 4, dtype=dtype)
        flip_bit(tensor, (1, 2), bit)
        assert (tensor != 1).nonzero().tolist() == [[1, 2]]
        flip_bit(tensor, (1, 2), bit)
        assert (tensor == 1).all()
    sign = torch.ones(1, dtype=dtype)
    flip_bit(sign, (0,), bits - 1)
    assert sign.item() == -1
