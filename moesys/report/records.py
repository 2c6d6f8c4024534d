"""Reading metrics.jsonl: one JSON object per line, in constant memory however long the run was.

The writer is `moesys.train.metrics`. A kill -9 can tear the last line, and nothing else: a last
line without its newline that is not JSON is left out, any other bad line is an error.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moesys.report.numbers import is_number

# The writer puts these keys last, in this order, so that a reader who wants the numbers need not parse
# layers * experts integers of every step.
EXPERT_KEYS = ("expert_holders", "expert_load")
_FAR_UNIX_S = 1e11
"""The year 5138."""
_EXPERT_MARKS = tuple(f', "{key}": '.encode() for key in EXPERT_KEYS)


def read_records(path: Path, *, expert_stride: int = 1) -> Iterator[dict[str, Any]]:
    """The records of `path` in file order.

    Args:
        expert_stride: what EXPERT_KEYS say is kept on every `expert_stride`-th line and on the last one, and
            left out elsewhere.

    Raises:
        ValueError: a line is not a JSON object with a "kind"; names the file and the line number.
    """
    for line, number, is_last in _lines(path):
        keep = is_last or number % expert_stride == 0
        record = parse_line(line if keep else without_experts(line), path=path, number=number)
        if record is not None:
            yield record


def parse_line(line: bytes, *, path: Path, number: int) -> dict[str, Any] | None:
    """One line as a record, or None where a kill tore it. Raises ValueError for other garbage."""
    try:
        record = json.loads(line)
    except ValueError as error:
        if not line.endswith(b"\n"):
            return None
        raise ValueError(
            f"{path}, line {number}: not JSON ({error}). Only a last line without a newline may be "
            "torn; remove the line to read the rest."
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(
            f'{path}, line {number}: not a metrics record, which is a JSON object with a "kind"; '
            "remove the line to read the rest."
        )
    return record


def time_of(record: Mapping[str, Any]) -> float | None:
    """When a record was written, seconds since 1970; None where it does not say."""
    # `time_unix_s` was its name in older files.
    return unix_s_of(record.get("unix_s", record.get("time_unix_s")))


def unix_s_of(value: Any) -> float | None:
    """A moment, seconds since 1970; None for what is no number, or no moment that a clock shows."""
    return float(value) if is_number(value) and abs(value) < _FAR_UNIX_S else None


def without_experts(line: bytes) -> bytes:
    """`line` without its trailing EXPERT_KEYS; unchanged where they are absent, torn or not last."""
    for mark in reversed(_EXPERT_MARKS):
        line = _without_last(line, mark)
    return line


def expert_stride_for(path: Path, *, samples: int) -> int:
    """The `expert_stride` that keeps about `samples` steps, judged from the file's longest early line."""
    with path.open("rb") as file:
        longest_bytes = max(
            (len(line) for line, _ in zip(file, range(16), strict=False)), default=1
        )
    return max(1, path.stat().st_size // longest_bytes // samples)


def _without_last(line: bytes, mark: bytes) -> bytes:
    stripped = line.rstrip(b"\n")
    if not stripped.endswith(b"]}"):
        return line
    cut = stripped.rfind(mark)
    if cut < 0 or b'"' in stripped[cut + len(mark) :]:
        return line
    return stripped[:cut] + b"}\n"


def _lines(path: Path) -> Iterator[tuple[bytes, int, bool]]:
    with path.open("rb") as file:
        number = 0
        previous: bytes | None = None
        for line in file:
            if previous is not None:
                yield previous, number, False
            previous = line
            number += 1
        if previous is not None:
            yield previous, number, True
