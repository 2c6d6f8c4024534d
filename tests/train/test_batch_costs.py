"""What is read off two times: by hand, and where noise has the shorter one last longer."""

import pytest

from moesys.train.batch_costs import LEAST_S, slope


@pytest.mark.parametrize(
    ("many_s", "few_s", "expected"),
    [
        (12.0, 3.0, (1.0, 2.0)),
        (10.0, 1.0, (1.0, 0.0)),
        # A line through these meets none at less than none.
        (20.0, 1.0, (2.0, 0.0)),
        # As long for one as for ten.
        (10.0, 11.0, (1.0, 0.0)),
        (-1.0, -2.0, (LEAST_S, 0.0)),
    ],
)
def test_nothing_is_free_and_nothing_beside_takes_less_than_nothing(many_s, few_s, expected):
    assert slope(10, many_s, 1, few_s) == pytest.approx(expected)
