"""The benchmark of plans of batches: its batches are what they are called, and it runs."""

import numpy as np
import pytest

from benchmarks import batch_plans
from benchmarks.batch_plans import CAPACITY, KINDS, STEPS
from moesys.plan.batch.policies import POLICIES


@pytest.mark.parametrize("kind", KINDS)
def test_batches_fill_ranks_and_are_as_long_as_they_are_called(kind: str) -> None:
    room = 64 * CAPACITY
    lengths_S = KINDS[kind](np.random.default_rng(0), 64)
    assert lengths_S.sum() == pytest.approx(0.98 * STEPS * room, rel=0.01)
    assert lengths_S.max() <= 0.8 * room
    tail = lengths_S[lengths_S >= 0.2 * room].sum() / lengths_S.sum()
    least, most = {"a tenth long": (0.1, 0.3), "half long": (0.5, 0.8)}.get(kind, (0.0, 0.2))
    assert least <= tail <= most


def test_a_smoke_run() -> None:
    result = batch_plans.run(True, lambda line: None)
    plans = [row for row in result.rows if "lengths" in row]
    assert len(plans) == 4
    for row in plans:
        assert all(float(row[policy] or 0) >= 1 - 1e-9 for policy in POLICIES), "even work is least"
        assert float(row["hdp"] or 0) <= float(row["naive"] or 0) * (1 + 1e-9)
    delays = [float(row["sorted"] or 0) for row in result.rows if "levels of outliers" in row]
    assert delays == sorted(delays, reverse=True)
    assert result.headline["flexsp_over_even_ratio"] < 1.2
