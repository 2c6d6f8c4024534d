"""Asks other programs of this machine."""

import subprocess


def output(command: list[str], timeout_s: float = 5.0) -> str | None:
    """What a command printed; None if it is not there, fails, or takes longer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def first_line(text: str | None, containing: str = "") -> str:
    """The first line of an output that has `containing` in it; "" if there is none."""
    return next((line.strip() for line in (text or "").splitlines() if containing in line), "")
