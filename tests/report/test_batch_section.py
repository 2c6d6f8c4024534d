"""What the page says of batches of documents, against the records that it is made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.page_reader import page_of
from tests.report.test_placement_section import STEPS, write_placed

TITLES = ["Forward and backward", "Waits, as planned", "Sequences", "Micro-steps"]


def batch_fields(rng: np.random.Generator, step: int) -> dict[str, Any]:
    return {
        "sequences": int(rng.integers(5, 50)),
        "micro_steps": int(rng.integers(1, 9)),
        "planned_ms": rng.uniform(100, 900),
        "planned_idle": rng.uniform(0, 0.3),
        "planned_keys_wait": rng.uniform(0, 0.1),
        "ring_bytes": int(rng.integers(1, 9 << 20)),
    }


def test_curves_are_the_records(tmp_path: Path) -> None:
    records = write_placed(tmp_path, batch_fields)
    page = page_of(tmp_path)
    for chart, series, column, scale in (
        ("Forward and backward", "as planned", "planned_ms", 1),
        ("Waits, as planned", "for other ranks", "planned_idle", 100),
        ("Waits, as planned", "for keys of a ring", "planned_keys_wait", 100),
        ("Sequences", "sequences", "sequences", 1),
        ("Micro-steps", "micro-steps", "micro_steps", 1),
        ("Passed on around rings", "sent", "ring_bytes", 2**-20),
    ):
        x, y = page.series(chart, series)
        assert x == list(range(1, STEPS + 1))
        assert y == pytest.approx([scale * r[column] for r in records], rel=1e-5), (chart, series)
    _, measured = page.series("Forward and backward", "measured")
    assert measured == pytest.approx(
        [r["forward_ms"] + r["backward_ms"] for r in records], rel=1e-5
    )


def test_samples_of_equal_length_have_none(tmp_path: Path) -> None:
    write_placed(tmp_path)
    page = page_of(tmp_path)
    assert not set(TITLES) & set(page.texts)
