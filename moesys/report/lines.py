"""Columns of a run as charts, each with the run's marks."""

from typing import Any

import numpy as np

from moesys.report.chart import Chart, Mark, Series, line_chart, smoothed
from moesys.report.run import Run

_MOST_MARKS = 200


def marks(run: Run) -> list[Mark]:
    """Where the run was resumed, and where it stopped before its last step."""
    last_step = run.last_train.get("step", 0)
    resumed = [start.get("resumed_from_step") or 0 for start in run.starts]
    stopped = [stop.get("step") or 0 for stop in run.stops]
    return [
        *(Mark(x=step, kind="stopped") for step in stopped[-_MOST_MARKS:] if 0 < step < last_step),
        *(Mark(x=step, kind="resumed") for step in resumed[-_MOST_MARKS:] if step > 0),
    ]


class Lines:
    """Draws columns of one run, each chart with the run's marks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.marks = marks(run)
        self.steps = run.column("step")

    def of(self, column: str, name: str, colour: int, *, scale: float = 1.0) -> Series:
        y = scale * self.run.column(column)
        return Series(name=name, x=self.steps, y=y, colour=colour)

    def chart(self, title: str, unit: str, *series: Series, **options: Any) -> Chart | None:
        return line_chart(title, unit, series, marks=self.marks, **options)

    def chart_unless_zero(self, title: str, unit: str, *series: Series) -> Chart | None:
        """Counts from 0 on; none where every value is 0 or absent, since there is nothing to see."""
        shown = [one for one in series if np.nansum(np.abs(one.y)) > 0]
        return self.chart(title, unit, *shown, from_zero=True)

    def loss(
        self, title: str, unit: str, train: str, val: str, floor: float | None
    ) -> Chart | None:
        raw, per_bin = self.run.column(train), self.run.train.rows_per_bin
        each = "each step" if per_bin == 1 else f"mean of {per_bin} steps"
        smooth = smoothed(raw, span=len(raw) / 100)
        series = [
            Series(name=f"train, {each}", x=self.steps, y=raw, colour=1, style="faint"),
            Series(name="train, smoothed", x=self.steps, y=smooth, colour=1),
        ]
        if floor is not None and len(raw):
            level = np.full_like(raw, floor)
            name = "unigram entropy"
            series.append(Series(name=name, x=self.steps, y=level, colour=4, style="dashed"))
        val_x, val_y = self.run.eval_column("step"), self.run.eval_column(val)
        series.append(Series(name="validation", x=val_x, y=val_y, colour=2, style="dots"))
        return self.chart(title, unit, *series)

    def of_evals(self, title: str, unit: str, column: str) -> Chart | None:
        """A number that evaluations measure."""
        x, y = self.run.eval_column("step"), self.run.eval_column(column)
        return self.chart(title, unit, Series(name=column, x=x, y=y, colour=1, style="line"))
