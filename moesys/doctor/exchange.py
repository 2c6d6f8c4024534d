"""An all-to-all between two processes of this machine, which is what expert parallelism does all day.

python -m moesys.doctor.exchange BACKEND RANK STORE_FILE      # what the check starts twice
"""

import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moesys.doctor.finding import Finding, Where, fail, ok

COLLECTIVE_S = 20.0
LIMIT_S = 80.0
"""With the import of torch in two processes, on a machine that does many other things."""


def judge_exchange(backend: str, error: str, seconds: float) -> Finding:
    """`error`: what the first rank that failed said last; "" if rows arrived."""
    if not error:
        return ok(backend, f"two ranks: exchanged rows in {seconds:.1f} s, their start included")
    if backend == "nccl":
        fix = (
            "run with NCCL_DEBUG=INFO for the reason; NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 tell "
            "which way between the GPUs is broken"
        )
    else:
        fix = (
            "give this machine's name an address in /etc/hosts, or set GLOO_SOCKET_IFNAME (try lo)"
        )
    return fail(backend, f"two ranks: {error}", fix)


def exchange(where: Where) -> list[Finding]:
    """Over gloo; over NCCL too where torch sees two GPUs."""
    backends = ["gloo"]
    if torch.cuda.is_available() and torch.cuda.device_count() > 1 and dist.is_nccl_available():
        backends.append("nccl")
    return [_between_two(backend) for backend in backends]


def _between_two(backend: str) -> Finding:
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moesys_doctor_") as folder:
        command = [sys.executable, "-m", "moesys.doctor.exchange", backend]
        store = str(Path(folder, "store"))
        outputs = [Path(folder, f"rank{rank}") for rank in range(2)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), store],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=path.open("w"),
            )
            for rank, path in enumerate(outputs)
        ]
        try:
            error = _first_error(processes, outputs, start_s + LIMIT_S)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return judge_exchange(backend, error, time.monotonic() - start_s)


def _first_error(
    processes: list["subprocess.Popen[bytes]"], outputs: list[Path], deadline_s: float
) -> str:
    while True:
        codes = [process.poll() for process in processes]
        for code, output in zip(codes, outputs, strict=True):
            if code:
                lines = output.read_text(errors="replace").strip().splitlines()
                return lines[-1] if lines else f"a rank ended with {code}"
        if all(code == 0 for code in codes):
            return ""
        if time.monotonic() > deadline_s:
            return f"no end within {LIMIT_S:g} s"
        time.sleep(0.02)


def _run_rank(backend: str, rank: int, store: str) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    # Uneven on purpose: rank r sends r + 1 rows to each.
    sent = torch.full((2 * (rank + 1), 1024), float(rank), device=device)
    received = torch.empty(3, 1024, device=device)
    dist.all_to_all_single(received, sent, [1, 2], [rank + 1, rank + 1])
    if received[:, 0].tolist() != [0.0, 1.0, 1.0]:
        raise RuntimeError(f"rank {rank} received {received[:, 0].tolist()} for [0, 1, 1]")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _run_rank(sys.argv[1], int(sys.argv[2]), sys.argv[3])
