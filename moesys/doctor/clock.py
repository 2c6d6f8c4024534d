"""This machine's clock: is it kept right, and does the file system agree with it?"""

import ctypes
import os
import tempfile
import time
from pathlib import Path

from moesys.doctor.finding import Finding, Where, fail, ok, warn

WARN_SKEW_S, FAIL_SKEW_S = 1.0, 60.0
_STA_UNSYNC = 0x40
_TIMEX_BYTES, _STATUS_AT = 208, 40
"""struct timex of 64-bit Linux: uint modes, 4 longs (offset, freq, maxerror, esterror), int status, ..."""


def judge_sync(is_synchronised: bool | None) -> Finding:
    if is_synchronised is None:
        return ok("clock", "the kernel does not say whether it is synchronised")
    if is_synchronised:
        return ok("clock", "synchronised")
    return warn(
        "clock",
        "not synchronised by this kernel",
        "run chronyd or systemd-timesyncd on all nodes, or their host: times of logs and beats are compared",
    )


def judge_file_clock(folder: str, skew_s: float) -> Finding:
    """`skew_s`: time of a new file minus this machine's."""
    if abs(skew_s) < WARN_SKEW_S:
        return ok("clock of the disk", f"{folder}: within {WARN_SKEW_S:g} s of this machine's")
    side = "ahead of" if skew_s > 0 else "behind"
    detail = f"{folder}: {abs(skew_s):.1f} s {side} this machine's"
    fix = "synchronise the file server and this machine by NTP"
    if abs(skew_s) < FAIL_SKEW_S:
        return warn("clock of the disk", detail, f"{fix}: ages of files are wrong by so much")
    return fail("clock of the disk", detail, f"{fix}: what is new looks old, and is cleared away")


def clock(where: Where) -> list[Finding]:
    return [
        judge_sync(_is_synchronised()),
        judge_file_clock(str(where.run_dir), _skew(where.run_dir)),
    ]


def _is_synchronised() -> bool | None:
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0: asks, changes nothing
    try:
        if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
            return None
    except (AttributeError, OSError):
        return None
    return not int.from_bytes(timex.raw[_STATUS_AT : _STATUS_AT + 4], "little") & _STA_UNSYNC


def _skew(folder: Path) -> float:
    before_s = time.time()
    with tempfile.TemporaryFile(dir=folder, prefix=".moesys_doctor_", buffering=0) as file:
        file.write(b"x")
        os.fsync(file.fileno())
        written_s = os.fstat(file.fileno()).st_mtime
    return written_s - min(max(written_s, before_s), time.time())
