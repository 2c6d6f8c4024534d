"""The charts show what metrics.jsonl holds."""

from pathlib import Path

import numpy as np
import pytest

from moesys.train.metrics import MetricsLog, read_metrics
from tests.report.page_reader import Page, page_of
from tests.report.synthetic_run import UNIGRAM_BITS, train_record


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
        ("Exchanged between ranks", "between nodes", "between_nodes_bytes", 2**-20),
    ):
        x, y = full_page.series(chart, series)
        assert x == [record["step"] for record in train] == list(range(1, 601))
        assert y == pytest.approx([scale * record[column] for record in train], rel=1e-5), chart
    x, y = full_page.series("Bits per byte", "validation")
    assert x == list(range(50, 601, 50))
    assert y == pytest.approx([record["val_bits_per_byte"] for record in evals], rel=1e-5)
    assert set(full_page.series("Bits per byte", "unigram entropy")[1]) == {UNIGRAM_BITS}


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
