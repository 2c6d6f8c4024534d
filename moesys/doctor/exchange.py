"""An all-to-all between two processes of this machine, which is what expert parallelism does all day.

python -m moesys.doctor.exchange BACKEND FOLDER      # what the check starts: it forks both ranks
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moesys.doctor.finding import Finding, Where, fail, ok

COLLECTIVE_S = 20.0
LIMIT_S = 80.0
"""With the import of torch in a new process, on a machine that does many other things."""


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
        process = subprocess.Popen(
            [sys.executable, "-m", "moesys.doctor.exchange", backend, folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            error = process.communicate(timeout=LIMIT_S)[1].strip()
            if process.returncode and not error:
                error = f"they ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            error = f"no end within {LIMIT_S:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = error.splitlines()[-1] if process.returncode else ""
    return judge_exchange(backend, last, time.monotonic() - start_s)


def _run_both(backend: str, folder: Path) -> int:
    """Torch is imported once, which is most of the time; nothing of it has a thread or a device yet."""
    ranks = [_fork_rank(backend, rank, folder) for rank in range(2)]
    for _ in ranks:
        ended, status = os.wait()
        if code := os.waitstatus_to_exitcode(status):
            rank = ranks.index(ended)
            os.kill(ranks[1 - rank], signal.SIGKILL)
            said = (folder / f"rank{rank}").read_text(errors="replace").strip()
            print(said or f"a rank ended with {code}", file=sys.stderr)
            return 1
    return 0


def _fork_rank(backend: str, rank: int, folder: Path) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        os.dup2(os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
        _run_rank(backend, rank, str(folder / "store"))
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


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
    sys.exit(_run_both(sys.argv[1], Path(sys.argv[2])))
