"""Many rows in few bins."""

import numpy as np
import pytest

from moesys.report.binned import Binned


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
