"""A run folder on a disk that fills up: training goes on, and what it could not write comes in its order later."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.train.backlog import Backlog
from moesys.train.folder import may_fail, must_begin, write_text
from moesys.train.metrics import MetricsLog, read_metrics
from moesys.train.sinks import TensorboardSink
from tests.launch.braked_router import VARIABLE as BRAKE
from tests.train.launched import finish, overrides, records, start, wait_for_step

STEPS = ("train.steps=40", "checkpoint.every_steps=10", "train.eval_every_steps=0")


# What waits: no disk.


@given(
    sizes=st.lists(st.integers(1, 40), max_size=60),
    takes=st.lists(st.integers(0, 60), max_size=60),
    bound=st.integers(1, 300),
)
def test_lines_come_out_whole_in_order_and_the_oldest_are_dropped(sizes, takes, bound):
    backlog, file = Backlog(bound), b""
    lines = [b"%d:" % number + b"x" * size + b"\n" for number, size in enumerate(sizes)]
    pending = iter(takes)
    for line in lines:
        backlog.add(line)
        assert backlog.num_bytes <= bound + 2 * max(map(len, lines))
        content = backlog.next_bytes()
        taken = min(next(pending, 0), len(content))
        file += content[:taken]
        backlog.written(taken)
    while content := backlog.next_bytes():
        file += content
        backlog.written(len(content))
    assert (len(backlog), backlog.num_bytes) == (0, 0)
    found = file.splitlines(keepends=True)
    assert set(found) <= set(lines), "half a line"
    numbers = [lines.index(line) for line in found]
    assert numbers == sorted(numbers)
    assert len(found) + backlog.num_dropped == len(lines)
    assert not lines or found[-1] == lines[-1], "the newest is never dropped"


def test_nothing_is_dropped_below_the_bound():
    backlog = Backlog(100)
    for _ in range(10):
        backlog.add(b"123456789\n")
    assert (len(backlog), backlog.num_dropped) == (10, 0)


# A disk that is full: a small tmpfs.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "moesys-test", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """To the last byte."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    return filler


def step(number: int) -> dict[str, object]:
    return {"kind": "train", "step": number, "loss": 1.0, "text": "x" * 300}


def test_records_wait_and_come_in_their_order(disk, capfd):
    with MetricsLog(disk / "run") as log:
        log.write(step(1))
        filler = fill(disk)
        for number in range(2, 60):
            log.write(step(number))
        with pytest.raises(OSError, match=r"No space left on device: '.*/run/metrics\.jsonl'"):
            log.sync()
        on_disk = [record["step"] for record in read_metrics(log.path)]
        assert on_disk == list(range(1, len(on_disk) + 1))
        assert len(on_disk) < 30, "the disk was not full"
        filler.unlink()
        log.write(step(60))
        log.sync()
        assert [r["step"] for r in read_metrics(log.path)] == list(range(1, 61))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith(f"warning: {log.path} cannot be written (No space left on device; 0 ")
    assert f"{log.path} is written again, with " in said[1]


def test_a_kill_before_there_is_room_leaves_a_file_that_a_start_can_read(disk):
    log = MetricsLog(disk / "run")
    for number in range(1, 60):
        log.write(step(number))
        if number == 3:
            filler = fill(disk)
    assert not log.path.read_bytes().endswith(b"\n"), "no line was torn"
    filler.unlink()
    with MetricsLog(disk / "run", resume_step=3) as again:
        again.write(step(4))
    assert [r["step"] for r in read_metrics(log.path) if r["kind"] == "train"] == [1, 2, 3, 4]


def test_what_is_lost_at_the_end_is_told(disk, capfd):
    log = MetricsLog(disk / "run")
    fill(disk)
    for number in range(1, 60):
        log.write(step(number))
    log.close()
    assert " records are lost, the disk took none to the end" in capfd.readouterr().err


def test_a_sink_whose_disk_is_full_is_tried_again(tmp_path, capfd):
    class Full:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.has_room = True

        def write(self, record: dict) -> None:
            if not self.has_room:
                raise OSError(28, "No space left on device")
            self.steps.append(record["step"])

        def close(self) -> None: ...

    sink = Full()
    with MetricsLog(tmp_path, sinks=[sink]) as log:
        for number in range(1, 7):
            sink.has_room = number not in (2, 3, 5)
            log.write(step(number))
    assert sink.steps == [1, 4, 6]
    assert capfd.readouterr().err.count("Full cannot write") == 2


# TensorBoard's own thread ends with the error, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_has_every_step_once_its_disk_has_room(disk):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorboardSink(disk / "run")
    for number in range(1, 61):
        sink.write(step(number))
    filler = fill(disk)
    refused = 0
    for number in range(61, 400):
        try:
            sink.write(step(number))
        except OSError:
            refused += 1
    assert refused, "the disk was not full"
    filler.unlink()
    time.sleep(1.1)
    sink.write(step(400))
    sink.close()
    # Their names keep the order in which they were made.
    seconds = [path.name.split(".")[3] for path in (disk / "run" / "tensorboard").iterdir()]
    assert len(set(seconds)) == len(seconds) >= 2
    events = accumulator.EventAccumulator(str(disk / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 401))


def test_a_small_file_is_whole_or_as_it_was(disk, capfd):
    path = disk / "summary.json"
    write_text(path, "before")
    fill(disk)
    with may_fail(path, "the fix"):
        write_text(path, "x" * 100_000)
    said = capfd.readouterr().err
    assert f"warning: {path} cannot be written ([Errno 28] No space left on device" in said
    assert said.endswith("; the fix\n")
    assert path.read_text() == "before"
    assert sorted(entry.name for entry in disk.iterdir()) == ["filler", "summary.json"]
    with (
        pytest.raises(ValueError, match=r"free space there, or choose another run\.dir"),
        must_begin(disk),
    ):
        (disk / "config.yaml").write_text("x" * 100_000)


# The real job.


@pytest.mark.chaos
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_job_trains_on_through_a_full_disk(tiny_data, disk, tmp_path, monkeypatch, asynchronous):
    folder = disk / "run"
    more = [*STEPS, f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep_last=1"]
    # Slow until the disk is full: a save that is then half done would give room back.
    brake = tmp_path / "brake"
    brake.write_text("0.1")
    monkeypatch.setenv(BRAKE, str(brake))
    more.append("model.moe.router._target_=tests.launch.braked_router.BrakedRouter")
    process = start(2, overrides(folder, tiny_data, *more))
    wait_for_step(process, folder, 3)
    filler = fill(disk)
    brake.unlink()
    output: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if line.startswith("step 25/"):
                filler.unlink()

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(200)
    code, _ = finish(process)
    said = "".join(output)
    assert code == 0, said
    assert said.count(f"{folder}/metrics.jsonl cannot be written") == 1, said
    assert said.count(f"{folder}/metrics.jsonl is written again") == 1, said
    failed = [r["reason"] for r in records(folder, "checkpoint_failed")]
    assert [reason.partition(" in ")[0] for reason in failed] == [
        f"cannot save step {number}" for number in (10, 20)
    ], said
    assert [r["step"] for r in records(folder, "train")] == list(range(1, 41))
    assert [r["step"] for r in records(folder, "checkpoint")] == [30, 40]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 40
