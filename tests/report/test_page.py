"""The page: complete, self-contained, of bounded size, at every stage of a run."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesys.report.page import render
from moesys.report.run import read_run
from moesys.train.metrics import MetricsLog, read_metrics
from tests.report.page_reader import Page, page_of
from tests.report.synthetic_run import start_record, train_record, write_run


def assert_self_contained(page: Page) -> None:
    for tag, name, value in page.attributes:
        if name in (
            "src",
            "href",
            "srcset",
            "data",
            "action",
            "poster",
            "xlink:href",
            "background",
        ):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:60])
    assert not re.search(r"url\s*\(|@import|https?:|file:|//[a-z]", page.html.split("<main>")[0])
    assert not re.search(r"(fetch|XMLHttpRequest|import)\s*\(", page.html)
    assert not {tag for tag, _, _ in page.attributes} & {"link", "iframe", "object", "embed"}


def test_the_page_asks_for_nothing_and_forbids_asking(full_page: Page) -> None:
    assert_self_contained(full_page)
    policy = next(
        value
        for tag, name, value in full_page.attributes
        if (tag, name) == ("meta", "content") and "src" in value
    )
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_section_is_there_and_linked(full_page: Page) -> None:
    assert full_page.ids == {
        "loss", "schedule", "balance", "layers", "time", "goodput", "throughput", "documents", "history", "configuration", "environment",
    }  # fmt: skip
    links = {value[1:] for _, name, value in full_page.attributes if name == "href"}
    assert links == full_page.ids
    assert set(full_page.charts) == {
        "Cross-entropy", "Bits per byte", "Learning rate", "Gradient norm", "Load imbalance", "Balance losses",
        "Dead experts", "Step time", "Tokens per second", "Model FLOP utilisation", "Exchanged between ranks",
        "Document lengths",
    }  # fmt: skip


def test_tiles_and_table_are_the_summary_and_the_sums(full_run: Path, full_page: Page) -> None:
    assert full_page.tile("validation bits/byte") == ("0.7893", "unigram entropy 4.4100")
    assert full_page.tile("tokens/s") == ("23.5k", "4.92M tokens seen")
    assert full_page.tile("parameters") == ("18.9M", "7.34M active per token")
    assert full_page.tile("wall time") == ("3 min 52 s", "restarted once")
    train = [
        record for record in read_metrics(full_run / "metrics.jsonl") if record["kind"] == "train"
    ]
    worst = max(train, key=lambda record: record["max_load_imbalance"])
    assert full_page.tile("load imbalance") == (
        f"{train[-1]['load_imbalance']:.2f}",
        f"worst layer so far {worst['max_load_imbalance']:.2f} at step {worst['step']}",
    )
    step_ms = sum(record["step_ms"] for record in train)
    at = full_page.texts.index("backward", full_page.texts.index("of step"))
    backward_ms = sum(record["backward_ms"] for record in train)
    assert full_page.texts[at + 2 : at + 4] == [
        f"{backward_ms / 600:.4g} ms",
        f"{100 * backward_ms / step_ms:.1f}%",
    ]
    at = full_page.texts.index("12 evaluations")
    assert full_page.texts[at + 1 : at + 3] == ["9.6 s", "800 ms"]


def test_resume_and_stop_are_marked_and_told(full_page: Page) -> None:
    assert "resumed at step 240" in full_page.texts
    assert "stopped at step 252" in full_page.texts
    at = full_page.texts.index("when")
    told = [
        text
        for text in full_page.texts[at:]
        if text in ("started", "resumed", "ended", "checkpoint")
    ]
    assert told == [
        *("started", "checkpoint", "checkpoint", "ended"),
        *("resumed", "checkpoint", "checkpoint", "checkpoint", "checkpoint", "ended"),
    ]


def test_configuration_is_shown_whole_and_escaped(full_run: Path, tmp_path: Path) -> None:
    write_run(tmp_path, steps=3)
    (tmp_path / "config.yaml").write_text(
        "run: {name: '<script>alert(1)</script>'}\nmodel: {d_model: 256}\n"
    )
    page = page_of(tmp_path)
    assert "<script>alert" not in page.html
    assert "<script>alert(1)</script>" in page.texts
    assert "d_model: 256" in page.texts
    assert_self_contained(page)


def test_a_run_in_progress_without_evaluation_or_side_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log = MetricsLog(tmp_path)
    log.write(start_record(steps=600, unix_s=1_790_000_000.0))
    for step in range(1, 31):
        record = train_record(step, steps=600, layers=2, experts=40, rng=rng)
        log.write(
            {
                **record,
                "dead_experts": 0,
                "sent_bytes": 0,
                "between_nodes_bytes": 0,
                "exchange_ms": 0.0,
                "aux_loss": 0.0,
                "z_loss": 0.0,
            }
        )
    page = page_of(tmp_path)  # while the log is open
    last = read_metrics(log.path)[-1]
    log.close()
    assert page.ids == {
        "loss",
        "schedule",
        "balance",
        "layers",
        "time",
        "goodput",
        "throughput",
        "history",
        "environment",
    }
    assert not {
        "Dead experts",
        "Balance losses",
        "Exchanged between ranks",
        "Document lengths",
    } & set(page.charts)
    assert [one["name"] for one in page.charts["Bits per byte"]["series"]] == [
        "train, each step",
        "train, smoothed",
    ]
    assert "in progress (or killed: no stop record)" in page.texts
    assert page.tile("training bits/byte")[0] == f"{last['bits_per_byte']:.4f}"
    assert len(page.images) == 3  # 40 experts are too many to write out


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_first_steps_make_a_page(tmp_path: Path, steps: int) -> None:
    page = page_of(write_run(tmp_path, steps=600, until=steps))
    assert ("No step has been recorded yet." in page.texts) == (steps == 0)
    assert ("loss" in page.ids) == (steps > 0)
    assert "history" in page.ids
    if steps:
        assert page.series("Cross-entropy", "train, each step")[0] == list(range(1, steps + 1))


def test_a_huge_run_stays_small(tmp_path: Path) -> None:
    """The worst case for the page: every bin of every curve and of 60 x 256 noisy experts and their holders in use."""
    rng = np.random.default_rng(0)

    def of_experts() -> dict[str, list[list[int]]]:
        holders, load = rng.integers(1, 9, (60, 256)), rng.integers(0, 99, (60, 256))
        return {"expert_holders": holders.tolist(), "expert_load": load.tolist()}

    with MetricsLog(tmp_path) as log:
        log.write(start_record(steps=100_000, unix_s=1_790_000_000.0) | {"ep": 8})
        record = train_record(1, steps=100_000, layers=1, experts=4, rng=rng)
        del record["expert_load"]
        for step in range(1, 9601, 3):
            record |= {
                "step": step,
                "loss": rng.random(),
                "grad_norm": rng.random(),
                "forward_ms": rng.random(),
            }
            log.write(record | of_experts() if step % 25 == 1 else record)
    run = read_run(tmp_path)
    html = render(run)
    assert 500_000 < len(html) < 5_000_000
    assert len(run.train) <= 800
    assert run.loads is not None
    assert run.holders is not None
    for values in (run.loads, run.holders):
        assert values.binned_SLE.size <= 1_600_000
        assert values.binned_SLE.shape[1:] == (60, 256)
    page = Page(html)
    name = f"train, mean of {run.train.rows_per_bin} steps"
    assert len(page.series("Cross-entropy", name)[0]) == len(run.train)
    assert_self_contained(page)


def test_reporting_needs_no_torch(full_run: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from moesys.report.page import render; from moesys.report.run import read_run\n"
        "print(len(render(read_run(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(full_run)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100_000
