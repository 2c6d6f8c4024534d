"""What a report shows of a run whose rows are compressed."""

from pathlib import Path

import numpy as np
import pytest

from moesys.train.metrics import MetricsLog
from tests.report.page_reader import page_of
from tests.report.synthetic_run import train_record


def write(folder: Path, in_train: dict, in_eval: dict, chosen: list[str] | None = None) -> None:
    rng = np.random.default_rng(0)
    with MetricsLog(folder) as log:
        for step in range(1, 21):
            record = train_record(step, steps=20, layers=2, experts=3, rng=rng)
            if step == 6 and chosen:
                log.write({"kind": "codecs", "step": 6, "codec_by_layer": chosen})
            log.write(record | (in_train if step > 5 else {}))
            if step % 10 == 0:
                log.write({"kind": "eval", "step": step, "val_loss": 3.0} | in_eval)


def test_rows_and_errors_are_drawn(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"codec_rows": 0.2, "codec_rows_by_layer": [0.1, 0.3], "compression_ratio": 7.5},
        {"codec_error": 0.05, "codec_error_by_layer": [0.04, 0.06]},
    )
    page = page_of(tmp_path)
    assert page.series("Rows that travel", "rows")[1][5:] == pytest.approx([20] * 15)
    assert page.series("Compression ratio", "ratio")[1][5:] == pytest.approx([7.5] * 15)
    assert page.series("Error of compression", "codec_error") == ([10, 20], [0.05, 0.05])
    at = page.texts.index("relative error")
    assert page.texts[at + 1 : at + 9] == ["0", "-", "10.0", "0.0400", "1", "-", "30.0", "0.0600"]


def test_eight_bits_alone_have_an_error(tmp_path: Path) -> None:
    write(tmp_path, {}, {"codec_error": 0.01, "codec_error_by_layer": [0.01, 0.01]})
    page = page_of(tmp_path)
    assert "Rows that travel" not in page.charts
    at = page.texts.index("relative error")
    assert page.texts[at + 1 : at + 5] == ["0", "-", "-", "0.0100"]


def test_what_each_layer_chose_is_told(tmp_path: Path) -> None:
    write(tmp_path, {"codec_rows": 0.6, "codec_rows_by_layer": [1.0, 0.2]}, {}, ["none", "lsh"])
    page = page_of(tmp_path)
    at = page.texts.index("relative error")
    assert page.texts[at + 1 : at + 9] == ["0", "none", "100.0", "-", "1", "lsh", "20.0", "-"]


def test_the_busiest_uplinks_come_first(tmp_path: Path) -> None:
    write(tmp_path, {"between_nodes_bytes_by_node": [2**20, 3 * 2**20, 2 * 2**20]}, {})
    page = page_of(tmp_path)
    at = page.texts.index("over the mean")
    shown = ["1", "3.00", "1.500", "2", "2.00", "1.000", "0", "1.00", "0.500"]
    assert page.texts[at + 1 : at + 10] == shown


def test_a_run_without_has_no_such_section(tmp_path: Path) -> None:
    write(tmp_path, {}, {})
    assert "compression" not in page_of(tmp_path).ids
