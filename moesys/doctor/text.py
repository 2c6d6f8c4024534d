"""Findings and matrices as text."""

from collections.abc import Sequence

from moesys.doctor.finding import Finding

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
SHADES = "@%#*+=-:. "
"""Dark is slow."""
MAX_CELLS = 64
"""Rows of a heat map; more are folded."""


def line(finding: Finding) -> str:
    fix = f"\n            -> {finding.fix}" if finding.fix else ""
    return f"{MARKS[finding.level]}  {finding.name}: {finding.detail}{fix}"


def summary(findings: Sequence[Finding], seconds: float) -> str:
    failed, warned = (sum(f.level == level for f in findings) for level in ("fail", "warn"))
    return f"{len(findings)} checks, {warned} warnings, {failed} failures in {seconds:.1f} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, *rows]
    ]


def fold(matrix: Sequence[Sequence[float | None]], limit: int) -> list[list[float | None]]:
    """At most `limit` rows and columns: neighbours share a cell, with the least of them. None = not measured."""
    size = -(-len(matrix) // limit)
    starts = range(0, len(matrix), size)

    def least(row: int, column: int) -> float | None:
        rows = matrix[row : row + size]
        values = [v for cells in rows for v in cells[column : column + size] if v is not None]
        return min(values, default=None)

    return [[least(row, column) for column in starts] for row in starts]


def heat_map(names: Sequence[str], rates: Sequence[Sequence[float | None]]) -> list[str]:
    """Rates [N, N] between N names, each as a shade: blank is the best, @ is nothing, ? was not measured."""
    cells = fold(rates, MAX_CELLS)
    size = -(-len(names) // MAX_CELLS)
    labels = [names[row * size] + ("..." if size > 1 else "") for row in range(len(cells))]
    best = max((v for row in cells for v in row if v is not None), default=0.0)
    width = max(map(len, labels))
    return [
        f"{label.rjust(width)} |"
        + "".join(
            "\\" if row == column and size == 1 else _shade(value, best)
            for column, value in enumerate(values)
        )
        + "|"
        for row, (label, values) in enumerate(zip(labels, cells, strict=True))
    ]


def _shade(value: float | None, best: float) -> str:
    if value is None:
        return "?"
    share = value / best if best > 0 else 0.0
    return SHADES[min(len(SHADES) - 1, int(share * (len(SHADES) - 1) + 0.5))]
