"""Runs checks one after the other: one that raises or takes too long is a finding, and the next one goes on."""

import threading
from collections.abc import Iterable, Iterator, Sequence

from moesys.doctor.finding import Check, Finding, Where, fail, warn


def run_checks(checks: Iterable[Check], where: Where) -> Iterator[Finding]:
    """Findings as they are made."""
    for check in checks:
        yield from _run(check, where)


def judge_crash(name: str, error: Exception) -> Finding:
    """A check that raised: what it looks at is unlike anything it knows, which is worth a look, not an end."""
    return warn(
        name,
        f"cannot be checked ({type(error).__name__}: {error})",
        "look at it by hand; `moesys doctor` should know this case",
    )


def judge_overtime(name: str, limit_s: float) -> Finding:
    return fail(
        name,
        f"no answer within {limit_s:g} s",
        "something hangs, a dead network file system or a device most often: see `dmesg`, `df`, `ps` (state D)",
    )


def _run(check: Check, where: Where) -> Sequence[Finding]:
    outcome: list[Sequence[Finding]] = []

    def find() -> None:
        try:
            outcome.append(check.find(where))
        except Exception as error:
            outcome.append([judge_crash(check.name, error)])

    # A thread that hangs in the kernel is left behind; daemon, so that it does not keep the process.
    thread = threading.Thread(target=find, name=f"check-{check.name}", daemon=True)
    thread.start()
    thread.join(check.limit_s)
    return outcome[0] if outcome else [judge_overtime(check.name, check.limit_s)]
