"""The emulated cluster: its rates, delays and counts are what was asked for, and nothing of it stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.fabric import cores, network
from benchmarks.fabric.command import main
from benchmarks.fabric.job import STORE_PORT, rank_variables, run_job
from benchmarks.fabric.layout import PRESETS, Layout, rate_bits, with_preset
from benchmarks.fabric.network import FabricError, fabric, layout_of
from benchmarks.fabric.traffic import flows, uplinks
from moesys.parallel.launcher import find_place
from tests.benchmarks import fabric_ranks
from tests.moe.test_dispatch import make_routing

RANKS = [sys.executable, "-m", "tests.benchmarks.fabric_ranks"]
NAME = "testfabric"
needs_namespaces = pytest.mark.usefixtures("namespaces")


@pytest.fixture(scope="module")
def namespaces() -> None:
    reason = network.why_not()
    if reason is not None:
        pytest.skip(reason)


def spaces(name: str = NAME) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line.startswith(name)]


def groups() -> list[Path]:
    return [*cores.ROOT.glob(f"**/moesys-fabric/{NAME}-*")]


def run(layout: Layout, *words: str, timeout_s: float = 60.0) -> tuple[int, dict[int, list[str]]]:
    """Status, and what each rank said."""
    said: dict[int, list[str]] = {rank: [] for rank in range(layout.world_size)}
    status = run_job(
        layout,
        [*RANKS, *words],
        timeout_s=timeout_s,
        say=lambda rank, line: said[rank].append(line),
    )
    return status, said


@pytest.mark.parametrize(
    ("text", "bits"), [("200mbit", 200_000_000), ("1.5Gbit", 1_500_000_000), ("64kbit", 64_000)]
)
def test_rates(text: str, bits: int) -> None:
    assert rate_bits(text) == bits


@pytest.mark.parametrize("text", ["", "200", "200 megabit", "-1mbit", "0gbit", "1e3mbit"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        rate_bits(text)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="cannot be made") as error:
        Layout(
            name="Big_",
            num_nodes=0,
            ranks_per_node=99,
            mtu=100,
            delay_us=-1,
            inter_bits=100,
            cores_per_rank=0.0,
        )
    for words in (
        "name='Big_'",
        "nodes=0",
        "ranks-per-node=99",
        "mtu=100",
        "delay-us=-1",
        "inter=100bit",
        "cores-per-rank=0.0",
    ):
        assert words in str(error.value)


def test_a_preset_is_a_ratio() -> None:
    for preset in PRESETS.values():
        uplink_bits, delay_us = with_preset(preset, 4_000_000_000, ranks_per_node=2)
        assert 4_000_000_000 / (uplink_bits / 2) == pytest.approx(preset.ratio, rel=1e-6)
        assert delay_us == preset.delay_us


def test_ranks_find_their_place() -> None:
    layout = Layout(num_nodes=3, ranks_per_node=2)
    for rank in range(6):
        place = find_place(rank_variables(layout, rank))
        assert (place.rank, place.world_size, place.local_rank) == (rank, 6, rank % 2)
        assert place.ranks_per_node == 2
        assert place.store_host == layout.address(0)
    assert len({layout.address(rank) for rank in range(6)}) == 6
    assert len(set(layout.namespaces())) == 1 + 3 + 6


def test_without_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["up", "--nodes", "2"]) == 2
    assert "needs root: sudo moesys-fabric" in capsys.readouterr().err


@needs_namespaces
def test_payload_is_counted_exactly_and_the_uplink_has_its_rate() -> None:
    """Headers, acknowledgements and packets that were sent again are no payload."""
    num_bytes = 3_000_000
    layout = Layout(name=NAME, num_nodes=2, ranks_per_node=2, inter_bits=100_000_000)
    with fabric(layout):
        assert layout_of(NAME) == layout
        status, said = run(layout, "send", str(num_bytes))
        links = uplinks(layout)
        found = [flow for flow in flows(layout) if flow.payload_bytes]
    assert status == 0, said
    assert said[0] == [f"got {num_bytes}"]
    assert [link.payload_bytes for link in links] == [0, num_bytes]
    (flow,) = found
    assert (flow.source, flow.destination) == (layout.address(3), layout.address(0))
    assert links[1].sent_bytes > num_bytes
    seconds = float(said[3][0].split()[1])
    # A bucket of 2 ms more may leave at once; a busy machine is slower.
    assert num_bytes * 8 / 100e6 - 0.01 <= seconds <= 4 * num_bytes * 8 / 100e6
    assert spaces() == []


@needs_namespaces
def test_a_token_crosses_an_uplink_once_for_a_node() -> None:
    """Two widths differ by rows times width at each uplink, exactly: all else that crosses it is the same."""
    payload = {}
    for d in (256, 1280):
        layout = Layout(name=NAME, num_nodes=2, ranks_per_node=2)
        with fabric(layout):
            status, said = run(layout, "exchange", str(d))
            payload[d] = [link.payload_bytes for link in uplinks(layout, but_ports=[STORE_PORT])]
        assert status == 0, said
    ids = [make_routing(rank, "random")[1].topk_ids_TK.tolist() for rank in range(4)]
    crossing = [
        0,
        0,
    ]  # tokens of a node with an expert on the other, whose experts are half of the 8
    for rank, tokens in enumerate(ids):
        other = 1 - rank // 2
        crossing[rank // 2] += sum(any(e // 4 == other for e in token) for token in tokens)
    # A token goes there and its result's gradient after it; its result and its own gradient come back.
    rows = [2 * crossing[node] + 2 * crossing[1 - node] for node in range(2)]
    grown = [wide - narrow for narrow, wide in zip(*payload.values(), strict=True)]
    assert grown == [1024 * 4 * count for count in rows]


@needs_namespaces
@pytest.mark.parity
@pytest.mark.parametrize("way", fabric_ranks.WAYS)
def test_rows_of_a_codec_cross_an_uplink_in_eight_bits(way: str) -> None:
    """A byte for each number of each row whose expert is on the other node, four times, exactly."""
    payload = {}
    for d in (256, 1280):
        layout = Layout(name=NAME, num_nodes=2, ranks_per_node=2)
        with fabric(layout):
            words = ("coded", str(d), str(fabric_ranks.WAYS.index(way)))
            status, said = run(layout, *words)
            payload[d] = [link.payload_bytes for link in uplinks(layout, but_ports=[STORE_PORT])]
        assert status == 0, said
    crossing = [0, 0]
    for rank in range(4):
        ids = make_routing(rank, "random")[1].topk_ids_TK.tolist()
        rows = {(e, t % fabric_ranks.NUM_CODES) for t, token in enumerate(ids) for e in token}
        crossing[rank // 2] += sum(e // 4 != rank // 2 for e, _ in rows)
    grown = [wide - narrow for narrow, wide in zip(*payload.values(), strict=True)]
    assert grown == [1024 * 2 * sum(crossing)] * 2


@needs_namespaces
def test_inside_a_node_nothing_crosses_an_uplink() -> None:
    layout = Layout(name=NAME, num_nodes=2, ranks_per_node=2)
    with fabric(layout):
        command = "import os; assert os.uname().nodename == 'node' + os.environ['GROUP_RANK']"
        assert run_job(layout, [sys.executable, "-c", command]) == 0
        one_node = Layout(name=NAME, num_nodes=1, ranks_per_node=2)
        status, said = run(one_node, "send", "100000")
        assert [link.payload_bytes for link in uplinks(layout)] == [0, 0]
    assert status == 0, said


@needs_namespaces
def test_a_delay_is_at_least_what_was_asked_for() -> None:
    seconds = {}
    for delay_us in (0, 3000):
        layout = Layout(name=NAME, num_nodes=2, ranks_per_node=1, delay_us=delay_us)
        with fabric(layout):
            status, said = run(layout, "round_trip")
        assert status == 0, said
        seconds[delay_us] = float(said[1][0].split()[1])
    assert 2 * 0.003 <= seconds[3000] <= 2 * 0.003 + 0.02
    assert seconds[0] < 0.003


def slow_rank() -> Layout:
    """One, with a tenth of a core."""
    if reason := cores.why_not():
        pytest.skip(reason)
    return Layout(name=NAME, num_nodes=1, ranks_per_node=1, cores_per_rank=0.1)


@needs_namespaces
def test_a_rank_computes_with_its_share_of_a_core() -> None:
    """The kernel stops it whenever it has had its share of ten milliseconds; its group goes with the fabric."""
    layout = slow_rank()
    work = "import time\nwhile time.process_time() < 0.2: pass"
    with fabric(layout):
        assert run_job(layout, [sys.executable, "-c", work]) == 0
        (group,) = groups()
        told = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
        assert int(told["nr_throttled"]) >= 10
    assert not groups()


@needs_namespaces
def test_threads_that_carry_bytes_have_no_quota() -> None:
    """A thread with such a name computes for 0.1 s in far less than the second that a rank's share would take."""
    layout = slow_rank()
    work = """
import ctypes, threading, time
def busy():
    ctypes.CDLL(None).prctl(15, NAME)
    time.sleep(1.5)
    began = time.perf_counter()
    while time.thread_time() < 0.1: pass
    print(time.perf_counter() - began)
thread = threading.Thread(target=busy)
thread.start()
thread.join()
"""
    seconds = {}
    with fabric(layout):
        for name in ("gloo_tcp_loop", "other"):
            said: list[str] = []
            words = [sys.executable, "-c", work.replace("NAME", repr(name.encode()))]
            assert run_job(layout, words, say=lambda _, line, said=said: said.append(line)) == 0
            seconds[name] = float(said[0])
    assert seconds["gloo_tcp_loop"] < 0.6 < 0.8 < seconds["other"]


@needs_namespaces
def test_a_rank_that_fails_ends_the_others() -> None:
    layout = Layout(name=NAME, num_nodes=1, ranks_per_node=3)
    with fabric(layout):
        began = time.monotonic()
        status, _ = run(layout, "fail_on_1")
        assert status == 7
        assert time.monotonic() - began < 20
        assert run_job(layout, ["sleep", "60"], timeout_s=0.5) == 124
        assert (
            subprocess.run(["ip", "netns", "pids", layout.rank(0)], capture_output=True).stdout
            == b""
        )


@needs_namespaces
def test_nothing_stays_after_kill_9() -> None:
    """Of the process that made it: a guard sees its end."""
    code = (
        "import os, signal\n"
        "from benchmarks.fabric.layout import Layout\n"
        "from benchmarks.fabric.network import fabric\n"
        f"with fabric(Layout(name='{NAME}', num_nodes=2, ranks_per_node=1, delay_us=100)):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while spaces() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert spaces() == []
    assert not (network.STATE / NAME).exists()


@needs_namespaces
def test_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    name = ["--name", NAME]
    try:
        assert (
            main(["up", *name, "--nodes", "2", "--preset", "pcie+25gbe", "--intra", "640mbit"]) == 0
        )
        assert "uplinks 10 Mbit/s" in capfd.readouterr().out
        assert main(["run", *name, "--", "sh", "-c", "echo rank $RANK on $(hostname)"]) == 0
        assert sorted(capfd.readouterr().out.splitlines()) == [
            "[0] rank 0 on node0",
            "[1] rank 1 on node1",
        ]
        assert main(["stats", *name, "--json"]) == 0
        links = json.loads(capfd.readouterr().out)
        assert [link["node"] for link in links] == [0, 1]
        assert main(["run", *name, "--", "sh", "-c", "exit $RANK"]) == 1
        assert main(["stats", *name]) == 0
        assert "TCP payload" in capfd.readouterr().out
    finally:
        assert main(["down", *name]) == 0
    assert "5 namespaces removed" in capfd.readouterr().out
    assert main(["down", *name]) == 0  # again
    assert main(["stats", *name]) == 2
    assert "no fabric 'testfabric' is up" in capfd.readouterr().err
    assert main(["up", *name, "--nodes", "2", "--inter", "1gbit", "--preset", "slow-wan"]) == 2
    assert "both set the uplinks" in capfd.readouterr().err


@needs_namespaces
def test_a_fabric_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FabricError("no more links")

    monkeypatch.setattr(network, "_rank", fail)
    with (
        pytest.raises(FabricError, match="no more links"),
        fabric(Layout(name=NAME, num_nodes=2, ranks_per_node=1)),
    ):
        pass
    assert spaces() == []
