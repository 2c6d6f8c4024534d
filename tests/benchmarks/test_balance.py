"""What the benchmark of planned batches makes of its steps, its corpora, and a smoke run of what is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import balance
from benchmarks.balance import HEAVY, REAL, SHORT, headlines
from benchmarks.balance.corpora import LONG, corpora, heavy_tail, one_giant, write_corpus
from benchmarks.balance.speed import corpus_rows
from moesys.data.indexed import IndexedTokens
from moesys.data.manifest import DataManifest
from moesys.data.sequences import find_sequences

TOKENS, LONGEST = 400_000, 16_384


@pytest.mark.parametrize("share", [0.098, 0.37])
def test_so_many_tokens_are_in_long_sequences(share: float) -> None:
    lengths = heavy_tail(TOKENS, LONGEST, long_share=share)
    of_long = lengths[lengths > LONGEST / LONG].sum() / lengths.sum()
    assert of_long == pytest.approx(share, abs=0.03)
    assert 0.95 * TOKENS < lengths.sum() <= TOKENS
    assert lengths.max() <= LONGEST


def test_one_in_four_tokens_is_a_giants() -> None:
    lengths = one_giant(TOKENS, LONGEST)
    giants = lengths == LONGEST
    assert giants[0]
    assert LONGEST * giants.sum() / lengths.sum() == pytest.approx(0.25, abs=0.03)
    assert lengths[~giants].max() <= LONGEST / 16


def test_a_corpus_is_read_as_any_data_is(tiny_data: Path, tmp_path: Path) -> None:
    lengths = np.array([5, 700, 31, 1])
    folder = write_corpus(tmp_path / "data", tiny_data, lengths)
    assert DataManifest.load(folder).splits["train"].documents == 4
    DataManifest.load(folder).verify(folder)
    tokens = IndexedTokens(folder / "train")
    found = find_sequences(tokens, 1000)
    assert found.starts_and_lengths(np.arange(4))[1].tolist() == lengths.tolist()
    names = corpora(tiny_data)
    assert names["standard library"](500, 64).max() <= 64
    assert {HEAVY, SHORT, REAL} <= set(names)


def told(policy: str, *steps: tuple[int, float, float]) -> list[dict[str, Any]]:
    rest = {"micro_steps": 3, "ring_bytes": 2**20, "idle_share": 0.1}
    return [
        {"variant": policy, "tokens": tokens, "step_ms": ms, "planned_ms": planned_ms, **rest}
        for tokens, ms, planned_ms in steps
    ]


def test_rates_are_tokens_over_time() -> None:
    records = [
        *told("static", (1000, 2000.0, 1800.0), (500, 1000.0, 1000.0)),
        *told("karmarkar_karp", (1000, 1000.0, 500.0), (500, 500.0, 500.0)),
        *told("hdp", (1000, 400.0, 500.0), (500, 100.0, 100.0)),
    ]
    rows = corpus_rows("dense", HEAVY, records)
    assert [(row["policy"], row["speedup"]) for row in rows] == [
        ("static", 1.0),
        ("karmarkar_karp", 2.0),
        ("hdp", 6.0),
    ]
    assert [row["prediction_error_pct"] for row in rows] == [5.0, 25.0, 12.5]
    found = headlines([*rows, {**rows[-1], "corpus": SHORT}, {**rows[-1], "corpus": REAL}])
    assert found["speedup_heavy_tail"] == found["worst_uniform"] == 6.0
    assert found["idle_pct"] == 10.0
    assert found["speedup_over_karmarkar_karp"] == 3.0


def test_what_is_computed_runs_quickly() -> None:
    result = balance.run(quick=True, progress=lambda _: None, only=("simulated", "planning"))
    ours = [row for row in result.rows if row.get("policy") == "hdp"]
    assert len(ours) == 4
    assert all(row["speedup"] > 1 for row in ours)
    assert not result.headline, "of 1024 ranks alone"
