"""A rank that dies, raises or hangs ends the job on all ranks, and every rank says which and at which step."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from moesys.parallel.flight import Collective, Flight, join_flights, read_flight
from moesys.parallel.lifeline import Lifeline, Lost
from moesys.train import neighbour
from moesys.train.exit_codes import LOST_EXIT_CODE
from moesys.train.patience import FACTOR, LONGEST_S, SHORTEST_S, patience_s, unheard
from moesys.train.verdict import (
    Beat,
    Report,
    absent_ranks,
    cause,
    is_settled,
    sentence,
    silent_ranks,
    table,
)
from moesys.train.watch import BEAT_S
from tests.train.launched import (
    ROOT,
    finish,
    one_rank,
    overrides,
    records,
    start,
    wait_for_end,
    wait_for_step,
)


def beat(step: int = 7, *, unix_s: float = 100.0, is_waiting: bool = True) -> Beat:
    return Beat(
        step=step,
        place="parallel/exchange.py:64 rows",
        collective="gloo:all_to_all #9 of ep (2 ranks)",
        is_waiting=is_waiting,
        waited_s=1.5,
        unix_s=unix_s,
    )


def report(kind, about: int, by: int | None = None, text: str = "") -> Report:
    return Report(kind=kind, about=about, by=about if by is None else by, step=7, text=text)


# Judging: no clock, no store.


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([], None),
        # A death is known later than the errors that follow from it.
        ([report("cut off", 0), report("cut off", 2), report("died", 1, 0)], ("died", 1)),
        # What was cut off, or gave up, leaves: that is no death that anything follows from.
        ([report("cut off", 2), report("died", 2, 0)], ("cut off", 2)),
        ([report("hung", 2), report("died", 2, 0)], ("hung", 2)),
        # A rank that raised is gone afterwards, and the others are cut off.
        ([report("failed", 1), report("cut off", 0), report("died", 1, 0)], ("failed", 1)),
        ([report("cut off", 0), report("hung", 1)], ("hung", 1)),
        ([report("died", 3, 0), report("failed", 1)], ("died", 3)),
        # A rank without its agent leaves, and the store went with that agent.
        ([report("hung", 2), report("orphaned", 1), report("died", 1, 0)], ("orphaned", 1)),
        # A stopped rank is killed because of the hang.
        ([report("hung", 0), report("died", 1, 2), report("stopped", 1, 0)], ("hung", 0)),
    ],
)
def test_what_the_rest_follows_from(reports, expected):
    found = cause(reports)
    assert (found and (found.kind, found.about)) == expected
    assert is_settled(found) == (expected is not None and expected[0] != "cut off")


def test_a_death_is_told_with_rank_step_and_where_it_was_seen():
    said = sentence(report("died", 1, 0), {1: beat(6)}, silence_limit_s=3.0)
    assert said.startswith("rank 1 died at step 7 (last seen at parallel/exchange.py:64 rows, ")
    assert sentence(report("died", 1, 0), {}, silence_limit_s=3.0) == "rank 1 died at step 7"
    silent = sentence(report("died", 1, 0, text="n2 is down"), {}, silence_limit_s=3.0)
    assert silent == "rank 1 is out of reach at step 7: n2 is down"


def test_a_rank_without_its_agent_says_so():
    said = sentence(
        report("orphaned", 1, text="torchrun, process 5, is gone"), {}, silence_limit_s=3.0
    )
    assert said == "rank 1 lost its launcher at step 7: torchrun, process 5, is gone"


def test_a_hang_names_the_silent_else_those_that_are_waited_for():
    hung = report("hung", 0, text="no progress for 8 s")
    beats = {0: beat(unix_s=108.2), 1: beat(unix_s=100.0), 2: beat(unix_s=107.9)}
    assert silent_ranks(beats, limit_s=3.0) == {1: pytest.approx(8.2)}
    assert "rank 1 is silent for 8.2 s" in sentence(hung, beats, silence_limit_s=3.0)
    beats[1] = beat(unix_s=108.0, is_waiting=False)
    assert absent_ranks(beats) == [1]
    assert "not in a collective: rank 1 (step 7" in sentence(hung, beats, silence_limit_s=3.0)
    # All wait: each for another collective, and nobody is named.
    beats[1] = beat(unix_s=108.0)
    assert sentence(hung, beats, silence_limit_s=3.0).endswith("no progress for 8 s")
    assert absent_ranks({0: beat(is_waiting=False)}) == []


def test_a_table_has_every_rank():
    lines = table({0: beat(), 2: beat(unix_s=92.0, is_waiting=False)}, range(3))
    assert "rank 0: step 7, waits 1.5 s in gloo:all_to_all #9" in lines[0]
    assert "rank 1: nothing is known" in lines[1]
    assert "last in gloo:all_to_all #9" in lines[2]
    assert "said 8.0 s before the others" in lines[2]


def test_the_oldest_collective_under_way_is_the_one_that_is_shown():
    def entry(number: int, *, done: bool) -> dict:
        return {
            "record_id": number,
            "retired": done,
            "process_group": ["3", "mesh_ep"],
            "profiling_name": "gloo:all_to_all",
            "is_p2p": False,
            "collective_seq_id": number,
        }

    def trace(*entries: dict, completed: int) -> dict:
        return {
            "entries": list(entries),
            "pg_status": {"3": {"last_completed_collective": completed}},
        }

    now = read_flight(trace(entry(2, done=False), entry(1, done=True), completed=1), {"3": 4})
    assert str(now.last) == "gloo:all_to_all #2 of mesh_ep (4 ranks)"
    assert now.is_waiting
    later = read_flight(trace(entry(2, done=False), entry(3, done=False), completed=1), {"3": 4})
    assert later == now, "more was called, nothing was completed"
    after = read_flight(trace(entry(2, done=True), entry(3, done=True), completed=3), {"3": 4})
    assert str(after.last).startswith("gloo:all_to_all #3")
    assert not after.is_waiting
    assert after.done != now.done
    assert not read_flight({}, {}).is_waiting


def test_what_a_save_waits_for_over_gloo_is_seen_beside_nccl():
    def one(name: str, *, is_done: bool) -> Flight:
        last = Collective(name=name, number=3, group="mesh_ep", ranks=2, is_done=is_done)
        return Flight(last=last, done=((name, "2"),))

    nothing = Flight(last=None, done=())
    done, waiting = one("nccl:all_reduce", is_done=True), one("gloo:all_gather", is_done=False)
    joined = join_flights([done, waiting])
    assert joined.is_waiting
    assert joined.last == waiting.last
    assert joined.done == done.done + waiting.done, "either is progress"
    assert join_flights([nothing, done]).last == join_flights([done, nothing]).last == done.last
    both = join_flights([one("nccl:all_reduce", is_done=False), waiting])
    assert str(both.last).startswith("nccl:all_reduce #3")
    assert not join_flights([nothing, nothing]).is_waiting


# Patience: numbers.


def test_patience_follows_the_last_steps():
    assert patience_s([]) == patience_s([0.1, 0.1]) == LONGEST_S, "nothing is known yet"
    assert patience_s([0.1] * 3) == SHORTEST_S
    assert patience_s([0.1, 0.1, 5.0]) == FACTOR * 5.0, "the slowest counts"
    assert patience_s([5.0] + [0.1] * 100) == SHORTEST_S, "of the last ones"
    assert patience_s([90.0] * 3) == LONGEST_S
    assert patience_s([3.0], few=1) == FACTOR * 3.0


def test_who_says_nothing_is_unheard_by_its_own_clock():
    assert unheard({0: 10.0, 1: 99.0}, {0: 10.5, 1: 99.0}) == [1]
    assert unheard({0: 10.0}, {0: 10.5, 1: 7.0}) == [], "the first word of a rank is one"


# A neighbour: processes of this machine.


def test_only_a_stopped_process_is_ended_and_no_other_of_its_number():
    with subprocess.Popen(["sleep", "60"]) as child:
        found = neighbour._look(child.pid)
        assert found is not None
        assert not neighbour.end_if_stopped(found), "it runs"
        child.send_signal(signal.SIGSTOP)
        while neighbour._state(child.pid) != "T":
            time.sleep(0.01)
        assert not neighbour.end_if_stopped(replace(found, started_ticks=found.started_ticks - 1))
        assert not neighbour.end_if_stopped(replace(found, boot="another machine"))
        assert child.poll() is None
        assert neighbour.end_if_stopped(found)
        assert child.wait(10) == -signal.SIGKILL
    assert not neighbour.end_if_stopped(found), "it is gone"


# The lifeline: sockets of this process.


def test_a_lost_connection_is_a_death_and_a_farewell_is_none():
    store = dist.HashStore()
    hub = Lifeline(0, store)
    ends = {rank: Lifeline(rank, store) for rank in (1, 2, 3)}
    _polled(hub, 0.3)
    assert hub.poll(0.0) == []
    ends[1].close()
    ends[2].leave()
    ends[2].close()
    assert _polled(hub, 0.3) == [Lost(rank=1, is_silent=False)]
    hub.close()
    assert ends[3].poll(1.0) == [Lost(rank=0, is_silent=False)]
    ends[3].close()


def test_a_stranger_is_no_rank():
    import socket

    store = dist.HashStore()
    hub = Lifeline(0, store)
    port = int(store.get("lifeline").split()[1])
    for words in (b"x" * 40, b"0123456789 1".ljust(40), b""):
        stranger = socket.create_connection(("localhost", port))
        stranger.sendall(words)
        stranger.close()
        assert _polled(hub, 0.2) == []
    hub.close()


def _polled(line: Lifeline, seconds: float) -> list[Lost]:
    lost, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        lost += line.poll(0.05)
    return lost


# The real job.


def started(tiny_data, folder, *more: str, ranks: int = 2):
    process = start(ranks, overrides(folder, tiny_data, "train.steps=4000", *more))
    wait_for_step(process, folder, 3)
    time.sleep(2 * BEAT_S)  # three steps are taken sooner than all ranks have said where they are
    return process, [one_rank(process, rank) for rank in range(ranks)]


def leaving(output: str) -> list[str]:
    """What the ranks that left because of another one said."""
    return re.findall(r"^moesys: (.*)$", output, re.MULTILINE)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_killed_rank_is_named_by_the_others(tiny_data, tmp_path, victim):
    process, ranks = started(tiny_data, tmp_path / "run", ranks=4)
    ranks[victim].kill()
    for rank in set(ranks) - {ranks[victim]}:
        wait_for_end(rank, timeout_s=10)
    code, output = finish(process)
    assert code != 0
    said = leaving(output)
    assert len(said) == 3, output
    for line in said:
        step = re.match(rf"rank {victim} died at step (\d+) \(last seen at \S+:\d+ ", line)
        assert step is not None, output
        assert int(step[1]) >= 3
        assert line.endswith(f"leaves, exit code {LOST_EXIT_CODE}")
    if victim != 0:
        stop = records(tmp_path / "run", "stop")[-1]
        assert stop["reason"].startswith(f"failed: rank {victim} died at step ")


def test_ranks_do_not_outlive_their_agent(tiny_data, tmp_path):
    """The running one says why; a stopped one wakes up and ends too."""
    process, ranks = started(tiny_data, tmp_path / "run")
    ranks[1].send_signal(signal.SIGSTOP)
    process.kill()
    for rank in ranks:
        wait_for_end(rank, timeout_s=10)
    code, output = finish(process)
    assert code == -signal.SIGKILL
    said = leaving(output)
    assert len(said) == 2, output
    for line in said:
        assert re.match(
            rf"rank [01] lost its launcher at step \d+: torchrun, process {process.pid}, is gone",
            line,
        ), output
        assert line.endswith(f"leaves, exit code {LOST_EXIT_CODE}")
    (stop,) = records(tmp_path / "run", "stop")
    assert stop["reason"].startswith("failed: rank 0 lost its launcher at step ")


@pytest.mark.chaos
def test_a_wait_that_raises_nothing_ends_too(tiny_data, tmp_path, monkeypatch):
    """As over NCCL: the main thread of the rank that is left sees no error, and SIGTERM does not reach it."""
    monkeypatch.setenv("FAULT", "wait 0 41 60")
    router = "model.moe.router._target_=tests.train.faulty_router.FaultyRouter"
    process, ranks = started(tiny_data, tmp_path / "run", router)
    wait_until_a_step_is_late(tmp_path / "run")
    ranks[1].kill()
    wait_for_end(ranks[0], timeout_s=10)
    code, output = finish(process)
    assert code != 0
    (said,) = leaving(output)
    assert said.startswith("rank 1 died at step "), output
    (stop,) = records(tmp_path / "run", "stop")
    assert stop["reason"].startswith("failed: rank 1 died at step ")


def wait_until_a_step_is_late(folder) -> None:
    """Until two seconds brought no new one."""
    seen, since = 0, time.monotonic()
    while time.monotonic() - since < 2:
        if len(records(folder, "train")) > seen:
            seen, since = len(records(folder, "train")), time.monotonic()
        time.sleep(0.05)


@pytest.mark.alone
def test_a_stopped_rank_ends_the_job_in_the_configured_time(tiny_data, tmp_path):
    process, ranks = started(tiny_data, tmp_path / "run", "train.timeout_s=8", ranks=4)
    ranks[1].send_signal(signal.SIGSTOP)
    # Ten seconds, as after a death.
    waited_s = max(wait_for_end(ranks[rank], timeout_s=8 + 10) for rank in (0, 2, 3))
    wait_for_end(ranks[1], timeout_s=10)  # killed, or its agent would wait for it
    code, output = finish(process)
    assert code != 0
    assert waited_s > 7, "a rank that is only slow would have been given up too early"
    said = leaving(output)
    assert len(said) == 3, output
    for line in said:
        assert re.search(r"made no progress for 8 s \(train\.timeout_s\)", line), output
        assert re.search(r"rank 1 is silent for \d+\.\d s \(step \d+, ", line), output
    for rank in range(4):
        assert re.search(rf"^  rank {rank}: step \d+, .* in gloo:\w+ #\d+ of ", output, re.M), (
            output
        )
    assert re.search(r"^rank 0, main thread:$", output, re.M), output
    assert not re.search(r"^rank \d, thread watch", output, re.M), output
    assert "rank 1 is stopped, it is killed" in output
    assert "rank 1 is silent" in records(tmp_path / "run", "stop")[-1]["reason"]


def test_a_rank_that_raises_is_named_with_its_error(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "raise 1 41")
    router = "model.moe.router._target_=tests.train.faulty_router.FaultyRouter"
    code, output = finish(start(2, overrides(tmp_path / "run", tiny_data, router)))
    assert code != 0
    (said,) = leaving(output)
    assert re.match(r"rank 1 failed at step \d+: ArithmeticError: the poison works; rank 0", said)
    (stop,) = records(tmp_path / "run", "stop")
    assert "the poison works" in stop["reason"]


@pytest.mark.alone
@pytest.mark.parametrize("fault", ["wait all 41 14", "wait 1 41 6"])
@pytest.mark.chaos
def test_slow_steps_are_not_hung_ones(tiny_data, tmp_path, monkeypatch, fault):
    """No collective under way for longer than the timeout; then one, for less than it."""
    monkeypatch.setenv("FAULT", fault)
    router = "model.moe.router._target_=tests.train.faulty_router.FaultyRouter"
    given = overrides(tmp_path / "run", tiny_data, router, "train.timeout_s=9")
    code, output = finish(start(2, given))
    assert code == 0, output
    assert records(tmp_path / "run", "stop")[-1]["reason"] == "done"
    steps_ms = [r["step_ms"] for r in records(tmp_path / "run", "train")]
    assert max(steps_ms) > 5e3, "nothing was slow"


FAILS = """
import sys
from moesys.parallel.bootstrap import process_group
from moesys.train import watch

watch.BEAT_S = 0.0  # a thread is in the store whenever the interpreter ends
try:
    with process_group("cpu", 60.0, 60.0) as process, watch.Watch(process, 60.0):
        raise ValueError("no room")
except ValueError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def test_a_rank_that_fails_ends_with_its_own_code():
    """And not with SIGABRT, because a thread was in a C++ call while the interpreter ended."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = [*torchrun, "--no-python", sys.executable, "-c", FAILS]
    done = subprocess.run(
        given,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "error: no room" in done.stderr, done.stderr
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) in (["2"], ["2", "2"]), done.stderr


def test_a_world_of_one_has_no_threads():
    from moesys.parallel.bootstrap import process_group
    from moesys.train.watch import Watch

    before = threading.active_count()
    with process_group("cpu", 30.0) as process, Watch(process, 30.0) as watch:
        assert threading.active_count() == before
        assert watch.explain(ValueError("as it was")) == "as it was"
