"""A rank that dies, fails or hangs ends the job on all ranks, with its name, its step and every last collective.

Two threads beside the training loop. One talks to the job's store: what this rank does goes there twice
a second, and what others found comes from there. The other listens to the lifeline, sees a collective
that does not end, and ends this process if the main thread cannot: it may sit in a wait that no
exception leaves (NCCL does), so the end is `os._exit`. What is decided is in `verdict`.
"""

import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

import moesys
from moesys.parallel.bootstrap import Process
from moesys.parallel.flight import Flight, flight
from moesys.parallel.lifeline import Lifeline, Lost
from moesys.parallel.probing import FOUND_S
from moesys.train.agent import Agent
from moesys.train.exit_codes import LOST_EXIT_CODE
from moesys.train.neighbour import ProcessId, end_if_stopped, is_stopped, own_process
from moesys.train.patience import FACTOR, LONGEST_S, SHORTEST_S, unheard
from moesys.train.signals import STOP_SIGNALS
from moesys.train.verdict import (
    Beat,
    Kind,
    Report,
    cause,
    is_settled,
    sentence,
    silent_ranks,
    table,
)

Where = tuple[FrameType, int]
"""A call and the line that it is at."""
BEAT_S = 0.5
SILENCE_S = 3.0
"""Beats older than this, beside the others', are called silent. Silence alone ends nothing."""
PATIENCE_S = 3.0
"""For the cause behind a collective that raised, and for a main thread to end by itself."""
OWN_PATIENCE_S = 30.0
"""For a rank that failed by itself to close its files and groups."""
_LAST_CALL_S = 2.0
"""For a thread to come back from the store, which may be lost."""
AWAY_S = 5.0
"""A watch that did not run for so long was stopped itself: what it measured before does not count."""
ORPHAN_S = 1.0
"""The job's store may be lost just before the kernel says that the agent, which served it, is gone."""
_SMALL_WORLD = 64
"""Up to so many ranks each reads what all of them said last."""
_PACKAGE = str(Path(moesys.__file__).parent)


class Watch:
    """`with Watch(...) as watch:` around all that a rank does in a job. A world of one has nothing to watch."""

    def __init__(
        self, process: Process, timeout_s: float | None, agent: Agent | None = None
    ) -> None:
        """`timeout_s`: a collective may take so long, the slowest rank's arrival included. None = as `limit_s` says.
        `agent`: without it this rank ends."""
        self.step: Callable[[], int] = lambda: 0
        """Where the training loop is; set once there is one."""
        self.on_leave: Callable[[str], None] = lambda reason: None
        """Called with the reason before this process ends without its main thread."""
        self._rank, self._world_size = process.rank, process.world_size
        self._backend, self._timeout_s = process.backend, timeout_s
        self._nodes = process.nodes
        self.limit_s: Callable[[], float] = lambda: LONGEST_S
        """By what was measured, for what this rank does now; set once there is a training loop. Any thread."""
        self._agent = agent
        self._process = own_process()
        self._heard: tuple[float, dict[int, float]] | None = None
        self._reports: list[Report] = []  # in the order of their arrival; appended to only
        self._unsent: list[Report] = []
        self._news = threading.Condition()
        self._leaving = threading.Lock()
        self._explained: tuple[BaseException, str] | None = None
        self._failed_at: str | None = None
        self._closing = False
        self._flight: Flight | None = None
        self._progress_s = time.monotonic()

    def __enter__(self) -> Self:
        if self._world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            self._lifeline = Lifeline(self._rank, dist.PrefixStore("moesys/watch", store))
            # A client of the store serves one thread.
            self._post, self._reader = (
                dist.PrefixStore("moesys/watch", store.clone())  # pyright: ignore
                for _ in range(2)
            )
            self._threads = [
                threading.Thread(target=target, name=f"watch-{target.__name__}", daemon=True)
                for target in (self._talk, self._listen)
            ]
            for thread in self._threads:
                thread.start()
            if self._agent is not None:
                # One that is stopped wakes up, sees it, and ends.
                self._agent.at_its_end(signal.SIGCONT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._world_size == 1:
            return
        if error is not None:
            self.explain(error)
            found = cause(self._reports)
            assert found is not None, "explaining reports"
            if found.about != self._rank or found.kind != "failed":
                self._leave(found)
            atexit.register(self._end_threads, _LAST_CALL_S)
            return  # the error goes on; `_listen` waits for the end of this process
        self._end_threads()
        if self._agent is not None:
            self._agent.at_its_end(signal.SIGKILL)
        self._lifeline.leave()
        self._lifeline.close()

    def _end_threads(self, timeout_s: float | None = None) -> None:
        """Before the interpreter goes: it unwinds threads that come back from C++ later, which C++ answers with SIGABRT."""
        self._closing = True
        with self._news:
            self._news.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def explain(self, error: BaseException) -> str:
        """Main thread: why, naming the rank and the step. Tells the others; waits PATIENCE_S for what they know."""
        if self._world_size == 1:
            return str(error)
        if self._explained is None or self._explained[0] is not error:
            # The launcher ends the ranks that are left, but the reason is not told yet.
            for number in set(STOP_SIGNALS) - {signal.SIGINT}:
                signal.signal(number, signal.SIG_IGN)
            if error.__traceback__ is not None:
                self._failed_at = _place(_raised_in(error))
            text = f"{type(error).__name__}: {error}"
            if _is_of_a_collective(error):
                self._report("cut off", self._rank, text)
                self._wait_until(lambda: is_settled(cause(self._reports)), PATIENCE_S)
            else:
                self._report("failed", self._rank, text)
            self._wait_until(lambda: not self._unsent, 1.0)
            found = cause(self._reports)
            assert found is not None
            is_own = found.about == self._rank and found.kind == "failed"
            self._explained = error, str(error) if is_own else self._sentence(found)
        return self._explained[1]

    def is_hang(self) -> bool:
        """Whether what is known so far follows from a collective that did not end."""
        found = cause(self._reports)
        return found is not None and found.kind == "hung"

    # The first thread: the store.

    def _talk(self) -> None:
        received = 0
        while not self._closing:
            try:
                self._post.set(f"beat/{self._rank}", json.dumps(asdict(self._beat())))
                while self._unsent:
                    number = self._post.add("reports", 1)
                    self._post.set(f"report/{number}", json.dumps(asdict(self._unsent[0])))
                    self._unsent.pop(0)
                while self._post.check([f"report/{received + 1}"]):
                    received += 1
                    self._receive(Report(**json.loads(self._post.get(f"report/{received}"))))
            except RuntimeError as error:  # dist.DistError among them
                self._wait_until(
                    lambda: self._closing or cause(self._reports) is not None, ORPHAN_S
                )
                if not self._closing and cause(self._reports) is None:
                    self._report("hung", self._rank, f"the job's store does not answer: {error}")
                return
            with self._news:
                self._news.notify_all()
                self._news.wait_for(lambda: self._unsent or self._closing, BEAT_S)

    def _beat(self) -> Beat:
        current, waited_s = self._flight, time.monotonic() - self._progress_s
        is_waiting = current is not None and current.is_waiting
        return Beat(
            step=self.step(),
            place=self._failed_at or _place(_main_stack()),
            collective=str(current.last) if current and current.last else "no collective yet",
            is_waiting=is_waiting,
            waited_s=waited_s if is_waiting else 0.0,
            unix_s=time.time(),
            process=self._process,
        )

    # The second: the lifeline, and the end.

    def _listen(self) -> None:
        found_s, seen_s = None, time.monotonic()
        while not self._closing:
            for lost in self._lifeline.poll(BEAT_S / 2):
                self._report("died", lost.rank, self._silence(lost))
            if self._agent is not None and self._agent.is_gone:
                self._report(
                    "orphaned",
                    self._rank,
                    f"{self._agent.name}, process {self._agent.pid}, is gone",
                )
                self._agent = None  # told
            now_s = time.monotonic()
            if now_s - seen_s > AWAY_S:
                self._progress_s, self._heard = now_s, None
            seen_s = now_s
            self._follow_flight(now_s)
            found = cause(self._reports)
            if found is None:
                continue
            found_s = found_s or now_s
            if now_s - found_s >= self._patience_s(found):
                self._leave(found)

    def _silence(self, lost: Lost) -> str:
        """What is known of a rank's machine, if it is that which is lost."""
        if not lost.is_silent:
            return ""
        where = self._nodes[lost.rank]
        return f"{where} has answered nothing for {FOUND_S} s: it is down, or the network is cut"

    def _patience_s(self, found: Report) -> float:
        """For the main thread to say it and end."""
        is_own = found.about == self._rank
        if found.kind == "orphaned":
            return BEAT_S / 2 if is_own else PATIENCE_S  # until it is sent
        if found.kind == "hung":
            return 0.0 if is_own else PATIENCE_S  # it cannot, or is not concerned
        if found.kind == "failed":
            return OWN_PATIENCE_S if is_own else PATIENCE_S
        return PATIENCE_S if found.kind == "died" else 2 * PATIENCE_S

    def _follow_flight(self, now_s: float) -> None:
        before, self._flight = self._flight, flight(self._backend)
        if before is None or self._flight.done != before.done or not self._flight.is_waiting:
            self._progress_s, self._heard = now_s, None
        elif cause(self._reports) is None and (
            why := self._lost_patience(now_s - self._progress_s)
        ):
            waited = f"{self._flight.last} made no progress for"
            self._report("hung", self._rank, f"{waited} {why}")

    def _lost_patience(self, waited_s: float) -> str:
        """How long was too long, and by which rule; empty as long as it is not."""
        if self._timeout_s is not None:
            return f"{self._timeout_s:g} s (train.timeout_s)" if waited_s >= self._timeout_s else ""
        limit_s = self.limit_s()
        if waited_s >= limit_s:
            return f"{limit_s:g} s, {FACTOR:g} times the slowest before or {SHORTEST_S:g} s (train.timeout_s fixes it)"
        # Whatever it does, a process that runs sends beats.
        if waited_s < SHORTEST_S / 2 or self._world_size > _SMALL_WORLD:
            return ""
        said: dict[int, float] = {}
        _within(2.0, lambda: said.update(self._last_words()))
        since_s, before = self._heard = self._heard or (waited_s, said)
        silent_s = waited_s - since_s
        if silent_s < SHORTEST_S / 2:
            return ""
        self._heard = (waited_s, said)
        if said and not unheard(before, said):
            return ""
        return f"{waited_s:.0f} s, and not every rank sent a beat in the last {silent_s:.0f} s"

    def _last_words(self) -> dict[int, float]:
        beats = self._beats(range(self._world_size))
        return {rank: beat.unix_s for rank, beat in beats.items()}

    def _leave(self, found: Report) -> None:
        """Say why, and end this process; never returns."""
        self._leaving.acquire()  # for good: one thread says it
        reason = self._sentence(found)
        lines = [f"moesys: {reason}; rank {self._rank} leaves, exit code {LOST_EXIT_CODE}"]
        every: list[str] = []
        _within(2.0, lambda: every.extend(self._all_lines()))
        lines += every or table({self._rank: self._beat()}, [self._rank])
        if found.kind == "hung":
            lines += _all_stacks(f"rank {self._rank}")
        with suppress(OSError):  # a file on a full disk
            print("\n".join(lines), file=sys.stderr, flush=True)
        if self._explained is None:  # else the main thread has recorded it
            _within(2.0, lambda: self.on_leave(reason))
        if found.kind == "hung":
            self._end_stopped()
        self._lifeline.leave()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(LOST_EXIT_CODE)

    def _end_stopped(self) -> None:
        """Kill the ranks of this machine that cannot end by themselves; their death is no news then."""
        beats: dict[int, Beat] = {}
        _within(2.0, lambda: beats.update(self._beats(range(self._world_size))))
        stopped = {
            rank: process
            for rank in silent_ranks(beats, limit_s=SILENCE_S)
            if (process := beats[rank].process) is not None and is_stopped(process)
        }
        for rank in stopped:
            self._report("stopped", rank, "")
            print(f"rank {rank} is stopped, it is killed", file=sys.stderr, flush=True)
        if stopped:
            time.sleep(2 * BEAT_S)  # until all have read it
        for process in stopped.values():
            end_if_stopped(process)

    def _all_lines(self) -> list[str]:
        """Every rank's last collective, from the one rank that is first to ask."""
        if self._reader.add("tables", 1) > 1:
            return []
        ranks = range(self._world_size)
        return ["every rank's last collective:", *table(self._beats(ranks), ranks)]

    # What both share.

    def _report(self, kind: Kind, about: int, text: str) -> None:
        report = Report(kind=kind, about=about, by=self._rank, step=self.step(), text=text)
        with self._news:
            self._reports.append(report)
            self._unsent.append(report)
            self._news.notify_all()

    def _receive(self, report: Report) -> None:
        with self._news:
            if report.by != self._rank:
                self._reports.append(report)
            self._news.notify_all()

    def _wait_until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        with self._news:
            self._news.wait_for(is_so, timeout_s)

    def _sentence(self, found: Report) -> str:
        is_about_one = (
            found.kind in ("died", "failed", "orphaned") or self._world_size > _SMALL_WORLD
        )
        ranks = [found.about] if is_about_one else range(self._world_size)
        beats: dict[int, Beat] = {}
        _within(2.0, lambda: beats.update(self._beats(ranks)))
        return sentence(found, beats, silence_limit_s=SILENCE_S)

    def _beats(self, ranks: Iterable[int]) -> dict[int, Beat]:
        known = [rank for rank in ranks if self._reader.check([f"beat/{rank}"])]
        return {rank: _read_beat(self._reader.get(f"beat/{rank}")) for rank in known}


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether a backend raised it: gloo throws RuntimeError, with the line of its own source."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    )


def _read_beat(text: bytes) -> Beat:
    said = json.loads(text)
    process = said.pop("process")
    return Beat(**said, process=ProcessId(**process) if process else None)


def _all_stacks(whose: str) -> list[str]:
    """What each thread that runs code of this package is at, but for the watch's own."""
    frames = sys._current_frames()
    lines: list[str] = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        stack = list(traceback.walk_stack(frame)) if frame else []
        is_ours = any(frame.f_code.co_filename.startswith(_PACKAGE) for frame, _ in stack)
        if is_ours and not thread.name.startswith("watch-"):
            name = "main thread" if thread is threading.main_thread() else f"thread {thread.name}"
            lines += [
                f"{whose}, {name}:",
                *traceback.StackSummary.extract(reversed(stack)).format(),
            ]
    return lines


def _main_stack() -> list[Where]:
    """The main thread's calls now, innermost first."""
    return list(traceback.walk_stack(sys._current_frames()[threading.main_thread().ident or 0]))


def _raised_in(error: BaseException) -> list[Where]:
    """The calls that an error left, innermost first."""
    return list(traceback.walk_tb(error.__traceback__))[::-1]


def _place(stack: list[Where]) -> str:
    """The innermost line of this package in a stack, else its innermost line."""
    ours = [where for where in stack if where[0].f_code.co_filename.startswith(_PACKAGE)]
    frame, line = (ours or stack)[0]
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{line} {frame.f_code.co_name}"


def _within(limit_s: float, action: Callable[[], object]) -> None:
    """Try it, but go on after so long: the store, or a disk, may be what is lost."""

    def attempt() -> None:
        with suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
