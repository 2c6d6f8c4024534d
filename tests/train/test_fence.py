"""Two starts in one run folder: wherever the first is interrupted, it changes nothing that the second reads or writes."""

import os
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.checkpoint.errors import CheckpointError, Superseded
from moesys.checkpoint.folder import clear, latest, step_folders, step_of
from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.saver import Saver
from moesys.checkpoint.store import load_latest_good
from moesys.launch.status import read_status
from moesys.train.fence import claim
from moesys.train.metrics import MetricsLog, clear_unfinished
from moesys.train.turn import turn_to_write

KEEP_LAST = 2


class Start:
    """One start of a job: what rank 0 does in the run folder, step by step."""

    def __init__(self, folder: Path, called: Callable[[str], None] = lambda name: None) -> None:
        self.folder, self.called = folder, called
        self.directory = folder / "checkpoints"
        called("claim")
        self.generation = claim(folder)
        called("clear")
        clear(self.directory)
        called("read")
        found = load_latest_good(self.directory, {"x": torch.zeros(2)})
        self.step = found.step if found else 0
        self.saver = Saver(
            self.directory, keep_last=KEEP_LAST, asynchronous=False, check_turn=self.check
        )

    def check(self) -> None:
        self.called("check")
        self.generation.check()
        self.called("checked")

    def save(self) -> None:
        self.step += 1
        tensors = {"x": torch.full((2,), float(self.generation.number))}
        state = {"generation": self.generation.number}
        self.saver.begin(self.step, tensors, state, {}, lambda: self.called("written"))
        self.saver.wait()


def writers(folder: Path) -> dict[int, int]:
    """Step -> generation that wrote it, for all checkpoints."""
    return {
        step_of(path): read_manifest(path).state["generation"]
        for path in step_folders(folder / "checkpoints")
    }


class Pause:
    """Calls `meanwhile` at the `when`-th thing that the first start does, renames included."""

    def __init__(self, when: int, meanwhile: Callable[[], None]) -> None:
        self.when, self.meanwhile = when, meanwhile
        self.calls: list[str] = []
        self.is_away = False

    def __call__(self, name: str) -> None:
        if self.is_away:
            return
        self.calls.append(name)
        if len(self.calls) == self.when:
            self.is_away = True
            self.meanwhile()
            self.is_away = False


def interrupted(folder: Path, when: int, monkeypatch) -> tuple[list[str], dict[int, int], bool]:
    """The first start saves three times, the second starts and saves twice at its `when`-th call.

    Returns the calls, what the second saw when it began, and whether the first was refused in the end.
    """
    seen: dict[int, int] = {}

    def second() -> None:
        start = Start(folder)
        seen.update(writers(folder))
        for _ in range(KEEP_LAST):
            start.save()
        assert start.generation.number == 2
        seen.update({start.step - 1: 2, start.step: 2})

    pause = Pause(when, second)
    replace, mkdir = os.replace, os.mkdir
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a, **k: (pause("rename"), replace(*a, **k))[1])
        patch.setattr(os, "mkdir", lambda *a, **k: (pause("mkdir"), mkdir(*a, **k))[1])
        refused = False
        try:
            first = Start(folder, pause)
            for _ in range(3):
                first.save()
        except CheckpointError as error:
            refused = isinstance(error, Superseded)
    return pause.calls, seen, refused


def test_wherever_the_first_is_stopped_the_second_one_s_checkpoints_stay(tmp_path, monkeypatch):
    calls, _, refused = interrupted(tmp_path / "never", -1, monkeypatch)
    assert not refused
    assert calls.count("rename") > 3, "saves and what they push out"
    for when in range(calls.index("clear") + 1, len(calls) + 1):
        folder = tmp_path / f"at{when}"
        first_calls, seen, refused = interrupted(folder, when, monkeypatch)
        where = f"stopped before call {when} of {first_calls}"
        there = writers(folder)
        last = max(seen)
        assert seen[last] == 2, where
        # All that there is, the second one saw or wrote; its newest is the newest.
        assert there.items() <= seen.items(), f"{where}: {there}, not {seen}"
        assert [there.get(last - 1), there.get(last)] == [2, 2], f"{where}: {there}"
        found = latest(folder / "checkpoints")
        assert found is not None
        assert step_of(found) == last, where
        assert refused or when > len(calls) - 2, where


@settings(max_examples=60)
@given(turns=st.lists(st.sampled_from(["new", 0, 1, 2]), max_size=14))
def test_only_the_newest_of_many_starts_saves(tmp_path_factory, turns):
    folder = tmp_path_factory.mktemp("runs")
    starts: list[Start] = []
    for turn in ["new", *turns]:
        if turn == "new":
            starts.append(Start(folder))
        elif turn < len(starts):
            start, before = starts[turn], writers(folder)
            if start is starts[-1]:
                start.save()
                assert writers(folder)[start.step] == start.generation.number
            else:
                with pytest.raises(Superseded, match=f"generation {len(starts)} .* has taken over"):
                    start.save()
                assert writers(folder) == before
    assert [start.generation.number for start in starts] == list(range(1, len(starts) + 1))


def test_starts_at_once_get_different_numbers(tmp_path):
    barrier = threading.Barrier(8)

    def at_once(_: int) -> int:
        barrier.wait()
        return claim(tmp_path).number

    with futures.ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(at_once, range(8))) == list(range(1, 9))


def test_who_took_over_is_named(tmp_path):
    former = claim(tmp_path, job_id="17")
    former.check()
    claim(tmp_path, job_id="18")
    with pytest.raises(Superseded) as raised:
        former.check()
    said = str(raised.value)
    assert f"run.dir={tmp_path} has another writer: generation 2 (process {os.getpid()} on " in said
    assert "job 18, began 20" in said
    assert "from generation 1 (process" in said
    # A start that was killed while it wrote its name still counts.
    (tmp_path / "generations" / "000003").touch()
    with pytest.raises(Superseded, match=r"generation 3 \(unknown\)"):
        former.check()


def test_a_former_start_says_no_status(tmp_path):
    with turn_to_write(tmp_path) as former:
        claim(tmp_path)
        with pytest.raises(Superseded):
            former.say("done")
        former.say_failed("too late")
    status = read_status(tmp_path)
    assert status is not None
    assert status.state == "running"


def test_a_former_start_does_not_rewind_the_record(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"kind": "train", "step": step})
    former, before = claim(tmp_path), log.path.read_bytes()
    asked = []

    def taken_over_meanwhile() -> None:
        asked.append(claim(tmp_path))
        clear_unfinished(tmp_path)

    # Between the answer and the change.
    with pytest.raises(FileNotFoundError):
        MetricsLog(tmp_path, resume_step=2, check_turn=taken_over_meanwhile)
    with pytest.raises(Superseded):
        MetricsLog(tmp_path, resume_step=2, check_turn=former.check)
    assert asked
    assert log.path.read_bytes() == before


def test_an_error_in_its_turn_is_the_run_s_status(tmp_path):
    with pytest.raises(ArithmeticError), turn_to_write(tmp_path, lambda error: f"rank 3: {error}"):
        raise ArithmeticError("poison")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.reason) == ("failed", "rank 3: poison")
