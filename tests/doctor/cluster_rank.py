"""One rank of `moesys doctor --cluster` as a node of its own, with a fault of node n3 that the test chooses.

torchrun -m tests.doctor.cluster_rank FAULT ARGUMENTS...
srun python -m tests.doctor.cluster_rank FAULT ARGUMENTS...
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moesys.cli import main as moesys
from moesys.doctor import cluster, gemm, links, together
from moesys.parallel.hostlist import expand_hosts

FAULTY = "n3"


def main() -> int:
    if "SLURM_STEP_NODELIST" in os.environ:
        nodes = expand_hosts(os.environ["SLURM_STEP_NODELIST"])
        return examine(int(os.environ["SLURM_PROCID"]), nodes, *sys.argv[1:])
    return examine_alone_on_node(int(os.environ["RANK"]), *sys.argv[1:])


def examine_to_file(rank: int, environment: dict[str, str], output: str, *arguments: str) -> None:
    """The same in a process that was forked."""
    os.environ.update(environment, RANK=str(rank))
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        code = examine_alone_on_node(rank, *arguments)
    sys.exit(code)


def examine_alone_on_node(rank: int, *arguments: str) -> int:
    """One machine stands for four: each rank is the only one of its node."""
    os.environ.update(MOESYS_NODE=f"n{rank + 1}", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    return examine(rank, ("n1", "n2", "n3", "n4"), *arguments)


def examine(rank: int, nodes: Sequence[str], fault: str, *arguments: str) -> int:
    _give_exact_times(rank, nodes, fault)
    if fault == "missing":
        cluster.QUICK = dataclasses.replace(cluster.QUICK, reports_s=8.0)
    if nodes[rank] == FAULTY and fault in OF_ONE_NODE:
        OF_ONE_NODE[fault]()
    return moesys(["doctor", "--cluster", "--quick", *arguments])


def _give_exact_times(rank: int, nodes: Sequence[str], fault: str) -> None:
    """What is sent and computed is real; the times are not those of a machine that is busy with other things."""

    def is_slow(peer: int) -> bool:
        return fault == "slow node" and FAULTY in (nodes[rank], nodes[peer])

    def slow_down(real: Callable, seconds: Callable[[int], float]) -> Callable:
        def timed(peer: int, *rest: Any) -> float:
            assert real(peer, *rest) > 0
            return seconds(peer)

        return timed

    links.exchange_s = slow_down(links.exchange_s, lambda peer: 0.1 if is_slow(peer) else 0.001)
    links.round_trip_s = slow_down(links.round_trip_s, lambda peer: 1e-4)
    real_product = gemm.product_s
    is_straggler = fault == "slow product" and nodes[rank] == FAULTY

    def product_s(a: Any) -> float:
        assert real_product(a) > 0
        return 0.03 if is_straggler else 0.02

    gemm.product_s = product_s


def _another_version() -> None:
    torch.__version__ = "2.12.0"


def _another_clock() -> None:
    class Ahead:
        monotonic, sleep = time.monotonic, time.sleep

        @staticmethod
        def time() -> float:
            return time.time() + 7.0

    together.time = Ahead  # type: ignore[assignment]


def _raises() -> None:
    def broken(*_: Any) -> list[float]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gemm.time_products = broken


def _stays_away() -> None:
    sys.exit(0)


def _sees_another_folder() -> None:
    together.VISIBLE_WITHIN_S = 0.0
    together.sees_token = lambda store, folder, real=together.sees_token: real(store, folder / "..")


OF_ONE_NODE: dict[str, Callable[[], None]] = {
    "version": _another_version,
    "clock": _another_clock,
    "raises": _raises,
    "missing": _stays_away,
    "blind": _sees_another_folder,
}

if __name__ == "__main__":
    sys.exit(main())
