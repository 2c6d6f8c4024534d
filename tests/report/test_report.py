"""`moesys report` on synthetic runs: complete, self-contained, bounded, and true to the records."""

import argparse
import base64
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import UNIGRAM_BITS, start_record, train_record, write_run

from moesys.cli import report as command
from moesys.report.binned import Binned
from moesys.report.chart import smoothed, ticks
from moesys.report.heatmap import png_data_uri
from moesys.report.page import render
from moesys.report.records import without_load
from moesys.report.run import read_run
from moesys.train.metrics import MetricsLog, read_metrics


class Page(HTMLParser):
    """What a browser would see of a page: ids, attributes, texts, and the charts' numbers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.attributes: list[tuple[str, str, str]] = []
        self.images: list[dict[str, str]] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self._title = ""
        self._json = False
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "img":
            self.images.append(values)
        self._json = values.get("type") == "application/json"
        if tag not in ("meta", "img", "line", "path", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "path", "circle", "rect"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._json and self.open[-1] == "script":
            self.charts[self._title] = json.loads(data)
            return
        if self.open[-2:] == ["figcaption", "b"]:
            self._title = data
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    def series(self, chart: str, name: str) -> tuple[list[float], list[float]]:
        found = {one["name"]: one for one in self.charts[chart]["series"]}
        return found[name]["x"], found[name]["y"]

    def tile(self, label: str) -> tuple[str, str]:
        at = self.texts.index(label)
        return self.texts[at + 1], self.texts[at + 2]


def page_of(folder: Path) -> Page:
    return Page(render(read_run(folder)))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("full") / "tiny", steps=600)


@pytest.fixture(scope="module")
def full_page(full_run: Path) -> Page:
    return page_of(full_run)


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
        "loss", "schedule", "balance", "time", "throughput", "documents", "history", "configuration", "environment",
    }  # fmt: skip
    links = {value[1:] for _, name, value in full_page.attributes if name == "href"}
    assert links == full_page.ids
    assert set(full_page.charts) == {
        "Cross-entropy", "Bits per byte", "Learning rate", "Gradient norm", "Load imbalance", "Balance losses",
        "Dead experts", "Step time", "Tokens per second", "Model FLOP utilisation", "Exchanged between ranks",
        "Document lengths",
    }  # fmt: skip


def test_curves_are_the_records(full_run: Path, full_page: Page) -> None:
    records = read_metrics(full_run / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    for chart, series, column, scale in (
        ("Cross-entropy", "train, each step", "loss", 1),
        ("Bits per byte", "train, each step", "bits_per_byte", 1),
        ("Learning rate", "learning rate", "lr", 1),
        ("Gradient norm", "norm", "grad_norm", 1),
        ("Load imbalance", "worst layer", "max_load_imbalance", 1),
        ("Tokens per second", "tokens/s", "tokens_per_s", 1),
        ("Model FLOP utilisation", "MFU", "mfu", 100),
        ("Step time", "backward", "backward_ms", 1),
        ("Step time", "exchange, within forward and backward", "exchange_ms", 1),
        ("Exchanged between ranks", "sent", "sent_bytes", 2**-20),
    ):
        x, y = full_page.series(chart, series)
        assert x == [record["step"] for record in train] == list(range(1, 601))
        assert y == pytest.approx([scale * record[column] for record in train], rel=1e-5), chart
    x, y = full_page.series("Bits per byte", "validation")
    assert x == list(range(50, 601, 50))
    assert y == pytest.approx([record["val_bits_per_byte"] for record in evals], rel=1e-5)
    assert set(full_page.series("Bits per byte", "unigram entropy")[1]) == {UNIGRAM_BITS}


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


def test_the_last_loads_are_written_out(full_run: Path, full_page: Page) -> None:
    last = [
        record for record in read_metrics(full_run / "metrics.jsonl") if record["kind"] == "train"
    ][-1]
    load_LE = np.array(last["expert_load"])
    relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    at = full_page.texts.index("All layers at step 600")
    for layer in range(4):
        row = full_page.texts.index(f"layer\xa0{layer}", at)
        assert full_page.texts[row + 1 : row + 17] == [
            f"{value:.2f}" for value in relative_LE[layer]
        ]
    assert [image["alt"][:11] for image in full_page.images] == [f"MoE layer {i}" for i in range(4)]
    assert f"with {relative_LE[1].max():.2f} times the mean" in full_page.images[1]["alt"]


def test_heat_map_pixels_are_the_loads() -> None:
    relative = np.array([[0.0, 0.25, 0.5], [1.0, 2.0, 9.0]])
    width, height, palette, index = decode_png(png_data_uri(relative))
    assert (width, height) == (3, 2)
    assert index.tolist() == [
        [0, 1, 9],
        [17, 25, 33],
    ]  # black, then 33 levels of log2 from 1/4 to 4
    assert palette[0] == (0, 0, 0)
    lightness = [0.3 * r + 0.6 * g + 0.1 * b for r, g, b in palette[1:]]
    assert lightness[:17] == sorted(
        lightness[:17]
    )  # readable without colour: light in the middle only
    assert lightness[16:] == sorted(lightness[16:], reverse=True)


def decode_png(uri: str) -> tuple[int, int, list[tuple[int, ...]], np.ndarray]:
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(data[at + 8 + size : at + 12 + size])
        chunks[body[:4]], at = body[4:], at + 12 + size
    width, height = int.from_bytes(chunks[b"IHDR"][:4]), int.from_bytes(chunks[b"IHDR"][4:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    palette = [tuple(chunks[b"PLTE"][i : i + 3]) for i in range(0, len(chunks[b"PLTE"]), 3)]
    return width, height, palette, rows[:, 1:]


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
    log.write(start_record(steps=600, time_unix_s=1_790_000_000.0))
    for step in range(1, 31):
        record = train_record(step, steps=600, layers=2, experts=40, rng=rng)
        log.write(
            {
                **record,
                "dead_experts": 0,
                "sent_bytes": 0,
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
        "time",
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


def test_not_finite_values_are_gaps(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with MetricsLog(tmp_path) as log:
        for step in range(1, 12):
            record = train_record(step, steps=600, layers=1, experts=4, rng=rng)
            bad = float("nan") if step in (4, 11) else record["loss"]
            log.write(
                {
                    **record,
                    "loss": bad,
                    "mfu": None,
                    "grad_norm": float("inf"),
                    "expert_load": [[0, 0, 0, 0]],
                }
            )
    page = page_of(tmp_path)
    y = page.series("Cross-entropy", "train, each step")[1]
    assert [i for i, value in enumerate(y, 1) if value is None] == [4, 11]
    assert "Gradient norm" not in page.charts
    assert "Model FLOP utilisation" not in page.charts
    assert "nan" not in page.html.replace("Nan", "").split("<main>")[1]
    assert page.tile("MFU")[0] == "-"


def test_a_huge_run_stays_small(tmp_path: Path) -> None:
    """The worst case for the page: every bin of every curve and of 60 x 256 noisy experts in use."""
    rng = np.random.default_rng(0)
    with MetricsLog(tmp_path) as log:
        log.write(start_record(steps=100_000, time_unix_s=1_790_000_000.0))
        record = train_record(1, steps=100_000, layers=1, experts=4, rng=rng)
        del record["expert_load"]
        for step in range(1, 9601, 3):
            record |= {
                "step": step,
                "loss": rng.random(),
                "grad_norm": rng.random(),
                "forward_ms": rng.random(),
            }
            log.write(
                {**record, "expert_load": rng.integers(0, 99, (60, 256)).tolist()}
                if step % 25 == 1
                else record
            )
    run = read_run(tmp_path)
    html = render(run)
    assert 500_000 < len(html) < 5_000_000
    assert len(run.train) <= 800
    assert run.loads is not None
    assert run.loads.relative_SLE.size <= 1_600_000
    assert run.loads.relative_SLE.shape[1:] == (60, 256)
    page = Page(html)
    name = f"train, mean of {run.train.rows_per_bin} steps"
    assert len(page.series("Cross-entropy", name)[0]) == len(run.train)
    assert_self_contained(page)


def test_loads_are_sampled_but_never_the_last(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with MetricsLog(tmp_path) as log:
        for step in range(1, 3001):
            log.write({"kind": "train", "step": step, "loss": 1.0, "expert_load": [[step, 0]]})
        log.write(
            {
                "kind": "train",
                "step": 3001,
                "loss": 1.0,
                "expert_load": rng.integers(1, 9, (1, 2)).tolist(),
            }
        )
    run = read_run(tmp_path)
    assert run.loads is not None
    assert run.loads.stride > 1
    assert run.num_steps == 3001
    last = np.array(read_metrics(tmp_path / "metrics.jsonl")[-1]["expert_load"][0])
    assert run.loads.final_LE[0] == pytest.approx(last / last.mean())
    assert run.loads.final_step == 3001


def test_leaving_out_the_loads_changes_nothing_else() -> None:
    for record in (
        {"kind": "train", "step": 1, "expert_load": [[1, 2], [3, 4]]},
        {"kind": "train", "step": 1, "expert_load": []},
        {"kind": "stop", "reason": ', "expert_load": [1]}', "notes": [1]},
        {"kind": "stop", "reason": 'x, "expert_load": ]}'},
        {"kind": "start", "notes": ["a", "b"]},
    ):
        short = json.loads(without_load(json.dumps(record).encode() + b"\n"))
        assert short == {name: value for name, value in record.items() if name != "expert_load"}
    torn = b'{"kind": "train", "step": 1, "expert_load": [[1, 2]'
    assert without_load(torn) == torn


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 33, 100])
def test_binned_keeps_means_and_extremes(rows: int) -> None:
    values = np.random.default_rng(rows).standard_normal((rows, 3))
    values[1::3, 1] = np.nan
    values[:, 2] = np.nan
    binned = Binned((3,), 8)
    for row in values:
        binned.add(row)
    assert len(binned) <= 8
    assert len(binned) == -(-rows // binned.rows_per_bin)
    for i in range(len(binned)):
        part = values[i * binned.rows_per_bin : (i + 1) * binned.rows_per_bin]
        assert binned.mean[i, 0] == pytest.approx(part[:, 0].mean())
        assert (binned.low[i, 0], binned.high[i, 0]) == (part[:, 0].min(), part[:, 0].max())
        known = part[:, 1][np.isfinite(part[:, 1])]
        assert binned.mean[i, 1] == pytest.approx(
            known.mean() if len(known) else np.nan, nan_ok=True
        )
    assert np.isnan(binned.mean[:, 2]).all()


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(1, 600, 6) == [100, 200, 300, 400, 500, 600]
    assert ticks(0.11, 0.29, 4) == pytest.approx([0.15, 0.2, 0.25])


def test_smoothing_neither_lags_nor_moves_a_constant() -> None:
    assert smoothed(np.full(50, 3.0), 4) == pytest.approx(3.0)
    line = np.arange(200.0)
    assert smoothed(line, 3)[50:150] == pytest.approx(line[50:150])
    gap = np.array([1.0, np.nan, 1.0])
    assert smoothed(gap, 2) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)


def report(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["report", *arguments]))


def test_the_command_writes_the_page_into_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    assert report(str(folder)) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "done" in page.texts
    assert not list(folder.glob("*.tmp"))
    assert report(str(folder), "--output", str(tmp_path / "new" / "page.html")) == 0
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page.html


def test_the_command_prints_figures_as_json(
    full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(str(full_run), "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    train = [
        record for record in read_metrics(full_run / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert found["val_bits_per_byte"] == 0.7893
    assert found["step"] == found["steps"] == found["recorded_steps"] == 600
    assert found["status"] == "done"
    assert found["restarts"] == 1
    assert found["sent_bytes"] == 600 * 25_165_824
    assert found["step_time_ms"]["forward"] == pytest.approx(
        sum(record["forward_ms"] for record in train)
    )
    assert sum(found["step_time_ms"].values()) == pytest.approx(
        sum(record["step_ms"] for record in train)
    )
    assert found["mfu"] == pytest.approx(np.median([record["mfu"] for record in train[60:]]))
    assert not (full_run / "report.html").exists()
    assert report(str(full_run), "--json", "--output", str(tmp_path / "figures.json")) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == found


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run folder: .*metrics\.jsonl is missing"):
        report(str(tmp_path))
    write_run(tmp_path, steps=2)
    (tmp_path / "summary.json").write_text('{"status": ')
    with pytest.raises(ValueError, match=r"summary\.json: not JSON"):
        report(str(tmp_path))
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"summary\.json: must be a mapping"):
        report(str(tmp_path))
    (tmp_path / "summary.json").unlink()
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"config\.yaml: not YAML"):
        report(str(tmp_path))


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
