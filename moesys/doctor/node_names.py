"""Many node names as one short list, as Slurm writes it and reads it: `n[1-3,7],gpu-a01`. Pure."""

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(.*?)(\d+)")


def hostlist(names: Iterable[str]) -> str:
    """Names that end in a number are folded. 7 and 07 are two nodes, and stay so."""
    groups: dict[tuple[str, int], list[int]] = {}
    alone: list[str] = []
    for name in sorted(set(names)):
        found = _NUMBERED.fullmatch(name)
        if found is None:
            alone.append(name)
            continue
        before, number = found.groups()
        width = len(number) if number.startswith("0") and len(number) > 1 else 0
        groups.setdefault((before, width), []).append(int(number))
    words = [_word(*key, sorted(numbers)) for key, numbers in groups.items()]
    return ",".join([*alone, *words])


def _word(before: str, width: int, numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    spelled = [
        str(run[0]).zfill(width) if len(run) == 1 else "-".join(str(n).zfill(width) for n in run)
        for run in runs
    ]
    if len(numbers) == 1:
        return f"{before}{spelled[0]}"
    return f"{before}[{','.join(spelled)}]"
