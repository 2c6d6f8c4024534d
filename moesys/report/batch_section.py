"""The report's section on batches of documents: what plans were expected to take, and what steps took."""

from moesys.report.chart import Chart, Series
from moesys.report.lines import Lines

_MIB = 2**-20


def batch_charts(lines: Lines) -> list[Chart | None]:
    """None of them for a run on samples of equal length."""
    planned = lines.of("planned_ms", "as planned", 2)
    if not planned.y.size or not (planned.y > 0).any():
        return []
    measured_ms = lines.run.column("forward_ms") + lines.run.column("backward_ms")
    return [
        lines.chart(
            "Forward and backward",
            "milliseconds per step; of rank 0, waits for others included",
            planned,
            Series(name="measured", x=lines.steps, y=measured_ms, colour=1),
            from_zero=True,
        ),
        lines.chart(
            "Waits, as planned",
            "% of all ranks' time",
            lines.of("planned_idle", "for other ranks", 5, scale=100),
            lines.of("planned_keys_wait", "for keys of a ring", 6, scale=100),
            from_zero=True,
        ),
        lines.chart(
            "Sequences",
            "per step, all ranks",
            lines.of("sequences", "sequences", 3),
            from_zero=True,
        ),
        lines.chart(
            "Micro-steps",
            "per step, each rank",
            lines.of("micro_steps", "micro-steps", 4),
            from_zero=True,
        ),
        lines.chart_unless_zero(
            "Passed on around rings",
            "MiB per step, all ranks: keys, values and their gradients",
            lines.of("ring_bytes", "sent", 7, scale=_MIB),
        ),
    ]
