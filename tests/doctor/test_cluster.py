"""`moesys doctor --cluster` on four ranks, each the only one of its node: the faulty node is named, and it alone."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.doctor.cluster_rank import examine_to_file

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
TIMEOUT_S = 240

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "moesys.doctor.cluster"])


def run_ranks(
    folder: Path, port: int, fault: str, *arguments: str, **more: str
) -> list[int | None]:
    """Every rank's exit code; what rank 0 printed is in the file rank0."""
    environment = {
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    given = (*arguments, "--run-dir", str(folder), "--exclude-file", str(folder / "exclude"))
    ranks = [
        _context.Process(
            target=examine_to_file,
            args=(rank, environment, str(folder / f"rank{rank}"), fault, *given),
            daemon=True,
        )
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(TIMEOUT_S)
    finally:
        for process in ranks:
            process.kill()
    assert not list(folder.glob(".moesys_doctor*"))
    return [process.exitcode for process in ranks]


def examine(folder: Path, fault: str) -> tuple[list[int | None], dict[str, Any]]:
    """Every rank's exit code, and what rank 0 printed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    codes = run_ranks(folder, port, fault, "--json")
    return codes, json.loads((folder / "rank0").read_text())


def failures(outcome: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(f["name"], f["nodes"]) for f in outcome["findings"] if f["level"] == "fail"]


def test_four_equal_nodes_are_fit(tmp_path: Path) -> None:
    codes, outcome = examine(tmp_path, "none")
    assert codes == [0, 0, 0, 0]
    assert outcome["nodes"] == ["n1", "n2", "n3", "n4"]
    assert outcome["exclude"] == []
    assert not (tmp_path / "exclude").exists()
    assert failures(outcome) == []
    found = {f["name"]: f for f in outcome["findings"]}
    assert {"ranks", "same everywhere", "links", "matrix product", "clock skew"} <= found.keys()
    assert found["shared folder"]["detail"] == f"{tmp_path} is one folder on all nodes"
    # A node whose disk is busy just now has one less that is well.
    well = [f["nodes"] for f in outcome["findings"] if f["name"] == "own checks"]
    assert sorted(chain.from_iterable(well)) == ["n1", "n2", "n3", "n4"]
    # 1 MiB each way in 1 ms.
    assert [link["gbit_per_s"] for link in outcome["links"]] == [pytest.approx(8.388608)] * 6
    assert len({tuple(link["nodes"]) for link in outcome["links"]}) == 6


@pytest.mark.parametrize(
    ("fault", "name", "says"),
    [
        ("slow product", "matrix product", "rank 2: 30.00, 30.00, 30.00, 30.00, 30.00 ms"),
        ("version", "same torch", "2.12.0 on n3"),
        ("raises", "measuring", "rank 2: RuntimeError: CUDA error: an illegal memory access"),
        ("blind", "shared folder", "on 1 of 4 nodes is not what rank 0 sees"),
    ],
)
def test_the_faulty_node_is_named_and_must_go(
    tmp_path: Path, fault: str, name: str, says: str
) -> None:
    codes, outcome = examine(tmp_path, fault)
    assert failures(outcome) == [(name, ["n3"])]
    (finding,) = (f for f in outcome["findings"] if f["level"] == "fail")
    assert says in finding["detail"]
    assert finding["fix"]
    assert codes == [1, 1, 1, 1]
    assert outcome["exclude"] == ["n3"]
    assert (tmp_path / "exclude").read_text() == "n3\n"


def test_a_rank_that_never_comes_is_a_failure(tmp_path: Path) -> None:
    codes, outcome = examine(tmp_path, "missing")
    ((name, nodes),) = failures(outcome)
    (finding,) = (f for f in outcome["findings"] if f["level"] == "fail")
    assert (name, nodes) == ("ranks", [])
    assert finding["detail"] == "1 did not come within 8 s, the first is rank 2"
    assert outcome["nodes"] == ["n1", "n2", "n4"]
    assert codes == [1, 1, 0, 1]


def test_a_clock_that_is_ahead_is_a_warning(tmp_path: Path) -> None:
    codes, outcome = examine(tmp_path, "clock")
    assert codes == [0, 0, 0, 0]
    (skew,) = (f for f in outcome["findings"] if f["name"] == "clock skew")
    assert (skew["level"], skew["nodes"]) == ("warn", ["n3"])
    assert skew["detail"] == "7.0 s ahead of rank 0's"


def test_an_error_of_rank_0_at_the_end_keeps_no_rank_waiting(tmp_path: Path) -> None:
    (tmp_path / "exclude").write_text("rm [\n")
    codes, outcome = examine(tmp_path, "version")
    assert outcome["exclude"] == ["n3"]
    assert codes == [2, 1, 1, 1]
    assert (tmp_path / "exclude").read_text() == "rm [\n"


def is_told_of_the_slow_node(said: str, exclude: Path) -> None:
    assert "FAIL  n3: links: at best 0.0839 Gbit/s to any other node; 8.39 is usual" in said
    assert said.count("FAIL") == 1
    assert "\nn3           0.08          0.08" in said
    assert "\nn1 |\\ @ |\nn2 | \\@ |\nn3 |@@\\@|\nn4 |  @\\|\n" in said
    assert "must go: n3" in said
    # A node that had to go before stays out.
    assert exclude.read_text() == "n[3,7]\n"


def test_a_slow_node_is_in_the_table_and_the_exclude_file(tmp_path: Path) -> None:
    """With the job's store in another process, as torchrun's agent has it."""
    (tmp_path / "exclude").write_text("n7\n")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    codes = run_ranks(tmp_path, store.port, "slow node", **agent)
    assert codes == [1, 1, 1, 1]
    is_told_of_the_slow_node((tmp_path / "rank0").read_text(), tmp_path / "exclude")


@pytest.mark.chaos
def test_the_same_under_torchrun(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude"
    exclude.write_text("n7\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    rank = ["-m", "tests.doctor.cluster_rank", "slow node", "--exclude-file", str(exclude)]
    done = subprocess.run(
        [sys.executable, *torchrun, *rank, "--run-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    is_told_of_the_slow_node(done.stdout, exclude)
