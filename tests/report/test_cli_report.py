"""`moesys report`: the page or the figures, where they are asked for, or what is wrong with the folder."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from moesys.cli import report as command
from moesys.train.metrics import read_metrics
from tests.report.page_reader import Page
from tests.report.synthetic_run import write_run


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
    assert found["between_nodes_bytes"] == 600 * 6_291_456
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
