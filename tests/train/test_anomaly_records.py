"""Anomalies in metrics.jsonl, through resumes and roll backs, and in the views of it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesys.report.page import render
from moesys.report.run import read_run
from moesys.train.metrics import MetricsLog, read_metrics
from moesys.train.progress import LiveView, PlainView
from moesys.train.sinks import TensorboardSink
from tests.train.test_metrics import start, steps_of, train


def anomaly(step: int, number: int, action: str = "skip", **more: Any) -> dict[str, Any]:
    return {
        "kind": "anomaly", "step": step, "number": number, "reason": "loss spikes", "loss": 9.125, "grad_norm": 3.0,
        "limit": 6.25, "action": action, **more,
    }  # fmt: skip


LINES = {
    "skip": "gradients dropped",
    "reinject": "gradients dropped, the batch comes later",
    "lower_rate": "learning rate lowered",
    "roll_back": "rolled back to step 3",
    "stop": "the run ends",
}


def write(folder: Path, *records: dict[str, Any], **resume: int) -> None:
    with MetricsLog(folder, **resume) as log:
        for record in records:
            log.write(record)


def numbers(folder: Path) -> list[int]:
    return [r["number"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "anomaly"]


def test_a_resume_drops_the_anomalies_that_it_will_find_again(tmp_path: Path) -> None:
    write(tmp_path, start(), train(1), anomaly(2, 1), train(3), anomaly(4, 2), train(5))
    write(tmp_path, start(), resume_step=3, resume_anomalies=1)
    assert numbers(tmp_path) == [1]
    assert steps_of(read_metrics(tmp_path / "metrics.jsonl")) == [1, 3]
    # By number and not by step: after a roll back steps come again.
    write(tmp_path, start(), resume_step=1, resume_anomalies=1)
    assert numbers(tmp_path) == [1]
    write(tmp_path, start())
    assert numbers(tmp_path) == []


def test_a_roll_back_drops_steps_and_keeps_anomalies(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for record in (start(), train(1), anomaly(2, 1), train(3), train(4), train(5)):
            log.write(record)
        log.rewind(3)
        log.write(anomaly(6, 2, "roll_back", to_step=3))
        log.write(train(4, again=True))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert steps_of(records) == [1, 3, 4]
    assert records[-1]["again"]
    assert numbers(tmp_path) == [1, 2]
    (undone,) = [r for r in records if r["kind"] == "undone"]
    assert (undone["resumed_from_step"], undone["steps"], undone["spent_ms"]) == (3, 2, 200.0)


@pytest.mark.parametrize("action", LINES)
def test_the_console_tells_each(action: str) -> None:
    record = anomaly(7, 1, action, **({"to_step": 3} if action == "roll_back" else {}))
    plain, live = io.StringIO(), io.StringIO()
    view = PlainView("tiny", log_every_steps=1, stream=plain)
    view.write(start())
    view.write(record)
    expected = f"loss spikes (loss 9.125, grad_norm 3, limit 6.25): {LINES[action]}"
    assert plain.getvalue().endswith(f"step  7/20  {expected}\n")
    panel = LiveView("tiny", Console(file=live, width=200))
    panel.write(record)
    assert expected in live.getvalue()


def test_a_number_that_is_not_finite_is_a_dash() -> None:
    plain = io.StringIO()
    view = PlainView("tiny", log_every_steps=1, stream=plain)
    view.write(anomaly(7, 1, loss=None, limit=None, reason="loss is not finite"))
    assert "loss is not finite (loss -, grad_norm 3): gradients dropped" in plain.getvalue()


def test_tensorboard_hides_what_a_roll_back_undid(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorboardSink(tmp_path)
    for record in (train(1), train(2, loss=99.0), anomaly(3, 1, "roll_back", to_step=1), train(2)):
        sink.write(record)
    sink.close()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/loss")] == [
        (1, 4.9),
        (2, 4.8),
    ]


def test_the_report_lists_the_newest(tmp_path: Path) -> None:
    many = [anomaly(step, step) for step in range(2, 120)]
    last = anomaly(120, 119, "roll_back", to_step=3)
    write(tmp_path, start(), train(1), *many, last)
    run = read_run(tmp_path)
    assert run.num_anomalies == 119
    page = render(run)
    assert page.count("loss spikes (") == 100
    assert "rolled back to step 3" in page
    assert "19 earlier anomalies are not listed" in page
    assert "earlier checkpoints" not in page
