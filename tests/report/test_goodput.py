"""The ledger of a run's wall time: against a made-up history of starts, kills and resumes, and for any records."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moesys.report.figures import figures
from moesys.report.goodput import PARTS, Books, Ledger, goodput_lines, ledger_of
from moesys.report.numbers import duration
from moesys.report.page import render
from moesys.report.records import time_of
from moesys.report.run import read_run
from moesys.train.metrics import MetricsLog, read_metrics
from tests.report.page_reader import Page
from tests.report.synthetic_run import START_UNIX_S, write_run

BEGAN_MS = 1_790_000_000_000

times_ms = st.integers(0, 90_000)


@dataclass
class Life:
    """A run that knows where its time goes, beside the records that it leaves."""

    folder: Path
    now_ms: int = BEGAN_MS
    spent_ms: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    after_ms: dict[int, int] = field(default_factory=dict)
    """By step: what a resume from before it undoes."""
    part_ms: dict[int, dict[str, int]] = field(default_factory=dict)
    log: MetricsLog | None = None
    step: int = 0
    recorded_steps: list[int] = field(default_factory=list)
    steps_lost: int = 0
    is_done: bool = False

    def pass_time(self, part: str, ms: int, step: int | None = None) -> None:
        self.now_ms += ms
        self.spent_ms[part] += ms
        if step is not None:
            told = self.part_ms.setdefault(step, {})
            told[part] = told.get(part, 0) + ms

    def write(self, kind: str, **more: Any) -> None:
        assert self.log is not None
        self.log.write({"kind": kind, "unix_s": self.now_ms / 1e3, **more})

    def start(self, resume_step: int, draw: Any) -> None:
        if self.log is not None:
            self.log.close()
        gap_ms = draw(times_ms)
        if self.is_done or self.log is None:
            self.now_ms += gap_ms
        else:
            self.pass_time("down", gap_ms)
        told: dict[str, Any] = {}
        # Slurm tells whole seconds, and a stale one is of a start before.
        if draw(st.booleans()):
            told["submitted_unix_s"] = self.now_ms / 1e3
            self.pass_time("queue", draw(times_ms))
        elif self.log is not None:
            told["submitted_unix_s"] = (BEGAN_MS - 10_000) / 1e3
        told["created_unix_s"] = self.now_ms / 1e3
        self.pass_time("start_up", draw(times_ms))
        load_ms = draw(times_ms)
        self.pass_time("load", load_ms)
        for step in [step for step in self.part_ms if step > resume_step]:
            for part, ms in self.part_ms.pop(step).items():
                self.spent_ms[part] -= ms
                self.spent_ms["repeated"] += ms
        self.steps_lost += self.step - resume_step
        self.recorded_steps = [step for step in self.recorded_steps if step <= resume_step]
        self.step, self.is_done = resume_step, False
        self.log = MetricsLog(self.folder, resume_step=resume_step)
        self.write(
            "start", resumed_from_step=resume_step, start_up_s={"load": load_ms / 1e3}, **told
        )

    def train(self, draw: Any, unrecorded: int) -> None:
        """Steps up to one that is recorded."""
        first, self.step = self.step + 1, self.step + 1 + unrecorded
        steps_ms, data_ms = [], []
        for step in range(first, self.step + 1):
            data_ms.append(draw(times_ms))
            steps_ms.append(data_ms[-1] + draw(times_ms))
            self.pass_time("data", data_ms[-1], step)
            self.pass_time("productive", steps_ms[-1] - data_ms[-1], step)
        self.recorded_steps.append(self.step)
        self.pass_time("other", draw(st.integers(0, 50)))
        self.write(
            "train",
            step=self.step,
            step_ms=float(steps_ms[-1]),
            data_ms=float(data_ms[-1]),
            unrecorded_step_ms=float(sum(steps_ms[:-1])),
            unrecorded_data_ms=float(sum(data_ms[:-1])),
            expert_load=[[1, 2], [3, 4]],
        )

    def evaluate(self, ms: int) -> None:
        self.pass_time("evaluation", ms, self.step)
        self.write("eval", step=self.step, eval_ms=float(ms))

    def save(self, ms: int) -> None:
        self.pass_time("checkpoint", ms, self.step)
        self.write("checkpoint", step=self.step, checkpoint_ms=float(ms))

    def end(self, how: str, ms: int) -> None:
        if how == "hung":
            self.pass_time("hang", ms)
            self.write("goodput", step=self.step, goodput_pct=1.0)
            self.write("stop", step=self.step, reason="failed: no progress", cause="hung")
        elif how == "failed":
            self.pass_time("down", ms)
            self.write("stop", step=self.step, reason="failed: rank 1 died", cause="died")
        elif how == "torn":
            assert self.log is not None
            with self.log.path.open("a") as file:
                file.write('{"kind": "tra')
        elif how != "killed":
            self.pass_time("other", ms)
            self.write("stop", step=self.step, reason=how)
            self.is_done = how == "done"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_ledger_is_what_happened(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    draw = data.draw
    life = Life(tmp_path_factory.mktemp("life"))
    for _ in range(draw(st.integers(1, 4))):
        # A record of several steps is undone as a whole.
        life.start(draw(st.sampled_from([0, *life.recorded_steps])), draw)
        for _ in range(draw(st.integers(0, 4))):
            life.train(draw, draw(st.integers(0, 2)))
            if draw(st.booleans()):
                life.evaluate(draw(times_ms))
            if draw(st.booleans()):
                life.save(draw(times_ms))
        how = draw(st.sampled_from(["killed", "torn", "failed", "hung", "stopped", "done"]))
        life.end(how, draw(times_ms))
    assert life.log is not None
    ledger = life.log.books.ledger()
    assert ledger.parts_ms == life.spent_ms
    assert ledger.wall_ms == sum(life.spent_ms.values())
    assert ledger.steps_lost == life.steps_lost
    life.log.close()
    # The file alone says the same as the log that was open while it happened.
    assert ledger_of(read_metrics(life.log.path)) == ledger
    assert read_run(life.folder).ledger == ledger


numbers = st.one_of(st.none(), st.floats(), st.integers(-5, 10**9), st.booleans(), st.just("x"))
anything = st.fixed_dictionaries(
    {"kind": st.sampled_from(["start", "train", "eval", "checkpoint", "undone", "stop", "new"])},
    optional={
        **dict.fromkeys(["unix_s", "time_unix_s"], st.integers(0, 10**6)),
        **dict.fromkeys(
            [
                "step_ms",
                "data_ms",
                "eval_ms",
                "checkpoint_ms",
                "spent_ms",
                "created_unix_s",
                "submitted_unix_s",
            ],
            numbers,
        ),
        "reason": st.sampled_from(["done", "stopped", "failed: x"]),
        "cause": st.sampled_from(["hung", "died"]),
        "start_up_s": st.fixed_dictionaries({}, optional={"load": st.floats(0, 1e7)}),
    },
)


@given(records=st.lists(anything, max_size=30))
@example(records=[{"kind": "start", "unix_s": 1, "created_unix_s": 1e305}])
def test_any_records_sum_to_the_wall_time(records: list[dict[str, Any]]) -> None:
    ledger = ledger_of(records)
    assert all(ms >= 0 for ms in ledger.parts_ms.values()), ledger
    assert list(ledger.parts_ms) == list(PARTS)
    assert sum(ledger.parts_ms.values()) == ledger.wall_ms
    assert 0 <= ledger.goodput_pct <= 100
    times = [at for record in records if (at := time_of(record)) is not None]
    if times and not any(
        "created_unix_s" in r or "submitted_unix_s" in r or r.get("reason") == "done"
        for r in records
    ):
        assert ledger.wall_ms == round(1e3 * (max(times) - times[0]))


def test_looking_at_the_books_changes_nothing() -> None:
    books = Books()
    books.add({"kind": "start", "unix_s": 10.0})
    books.add({"kind": "train", "step": 1, "step_ms": 4000.0, "unix_s": 15.0})
    last = {"kind": "stop", "reason": "failed: x", "cause": "hung", "unix_s": 45.0}
    first = books.ledger(last)
    assert first.parts_ms["hang"] == 30_000
    assert books.ledger(last) == first
    assert books.ledger().wall_ms == 5_000


def test_a_run_without_times_has_no_ledger(tmp_path: Path) -> None:
    ledger = ledger_of([{"kind": "train", "step": 1, "step_ms": 5.0}])
    assert ledger == ledger_of([])
    assert ledger.wall_ms == 0
    assert ledger.goodput_pct == 0


def test_clocks_that_disagree_shorten_what_was_told() -> None:
    ledger = ledger_of(
        [
            {"kind": "start", "unix_s": 100.0},
            {"kind": "train", "step": 1, "step_ms": 30_000.0, "data_ms": 10_000.0, "unix_s": 106.0},
            {"kind": "start", "unix_s": 90.0, "created_unix_s": 80.0},
        ]
    )
    assert ledger.parts_ms == {
        **dict.fromkeys(PARTS, 0),
        "productive": 4_000,
        "data": 2_000,
    }


def test_the_split_of_a_start_is_added_up() -> None:
    split = {"import": 2.0, "load": 1.0}
    start = {"kind": "start", "unix_s": 10.0, "created_unix_s": 7.0, "start_up_s": split}
    train = {"kind": "train", "step": 1, "step_ms": 500.0, "first_step_ms": 500.0, "unix_s": 10.5}
    later = {**start, "unix_s": 20.0, "created_unix_s": 17.0}
    undone = {"kind": "undone", "steps": 1, "spent_ms": 500.0, "first_step_ms": 500.0}
    ledger = ledger_of([start, {**undone, "unix_s": 10.5}, later, {**train, "unix_s": 20.5}])
    assert list(ledger.start_up_s.items()) == [
        *(("queue", 0.0), ("import", 4.0), ("load", 2.0), ("first_step", 1.0)),
    ]
    assert ledger.parts_ms == {
        **dict.fromkeys(PARTS, 0),
        "productive": 500,
        "repeated": 500,
        "down": 6_500,
        "start_up": 4_000,
        "load": 2_000,
    }


def test_two_lines_for_people() -> None:
    ledger = Ledger(
        parts_ms={**dict.fromkeys(PARTS, 0), "productive": 90_000, "start_up": 7_500, "data": 2500},
        wall_ms=100_000,
        starts=2,
        steps_lost=1,
        start_up_s={},
    )
    assert goodput_lines(ledger.as_dict()) == (
        "goodput 90.0 %: productive 1 min 30 s of 1 min 40 s; 2 starts, 1 step lost",
        "the rest: start-up 7.5 s, data 2.5 s",
    )
    assert all(math.isfinite(v) for k, v in ledger.as_dict().items() if k != "start_up_parts_s")


def test_the_page_shows_every_part_that_took_time_and_every_straggler(tmp_path: Path) -> None:
    write_run(tmp_path, steps=300)
    slow = {"kind": "straggler", "step": 9, "rank": 3, "node": "<n>", "ratio": 2.5, "window": 30}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**slow, "unix_s": START_UNIX_S + 200}) + "\n")
    run = read_run(tmp_path)
    html = render(run)
    page = Page(html)
    shown = {part: ms for part, ms in run.ledger.parts_ms.items() if ms}
    assert {"productive", "repeated", "evaluation", "checkpoint", "data", "other"} <= set(shown)
    texts = page.texts[page.texts.index("part of the wall time") :]
    for part, ms in shown.items():
        at = texts.index(part)
        share = f"{100 * ms / run.ledger.wall_ms:.1f}%"
        assert texts[at + 1 : at + 4] == [duration(ms / 1e3), share, PARTS[part]]
    bar = re.findall(r'<div class="whole".*?</div>', html)[0]
    widths = re.findall(r"width:([\d.]+)%", bar)
    assert len(widths) == len(shown)
    assert sum(map(float, widths)) == pytest.approx(100, abs=0.01)
    assert page.tile("goodput")[0] == f"{run.ledger.goodput_pct:.1f}%"
    at = texts.index("for steps")
    assert texts[at + 1 : at + 6] == ["9", "3", "<n>", "2.50", "30"]
    assert figures(run)["goodput"] == run.ledger.as_dict()
    assert figures(run)["stragglers"][0]["rank"] == 3


def test_a_file_of_before_times_were_told_makes_a_page_without_the_section(tmp_path: Path) -> None:
    train = {"kind": "train", "step": 1, "loss": 2.0, "step_ms": 5.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train) + "\n")
    page = Page(render(read_run(tmp_path)))
    assert "goodput" not in page.ids
    assert page.tile("goodput")[0] == "-"
    older = {**train, "time_unix_s": 5.0}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"kind": "start", "time_unix_s": 4.0}) + "\n" + json.dumps(older) + "\n"
    )
    run = read_run(tmp_path)
    assert run.ledger.parts_ms == {**dict.fromkeys(PARTS, 0), "productive": 5, "other": 995}
    assert "goodput" in Page(render(run)).ids
