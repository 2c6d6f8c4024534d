"""Times of a rank's experts, and what all know of them later.

Shapes: S steps, P ranks.
"""

import json
import time

import numpy as np
import pytest
import torch

from moesys.plan.speeds import SPEED_STEPS, relative_speeds
from moesys.train.rank_speeds import RankSpeeds

CPU = torch.device("cpu")
RANKS, LATER, STEPS = 3, 4, 20


def test_rows_are_timed_and_read_once() -> None:
    speeds = RankSpeeds(1, RANKS, CPU, 0)
    for rows in (100, 50):
        with speeds.timed(rows):
            time.sleep(0.01)
    with speeds.timed(0):
        time.sleep(0.1)
    time.sleep(0.1)
    us_and_rows = np.array(speeds.numbers()).reshape(2, RANKS)
    assert us_and_rows[1].tolist() == [0, 150, 0]
    assert us_and_rows[0, [0, 2]].tolist() == [0, 0]
    assert 20_000 <= us_and_rows[0, 1] < 100_000
    assert us_and_rows[0, 1] == round(us_and_rows[0, 1])
    assert speeds.numbers() == [0.0] * (2 * RANKS)


@pytest.mark.parametrize("resumes", [False, True])
def test_speeds_of_steps_back_are_what_they_were(resumes: bool) -> None:
    """Of `LATER` steps back, also after a resume: of the plan in force, to be made once more."""
    rng = np.random.default_rng(0)
    told_S2P = rng.integers(100, 1000, (STEPS, 2, RANKS))
    speeds = RankSpeeds(0, RANKS, CPU, LATER)
    assert speeds.as_of(1).tolist() == [1.0] * RANKS
    for step, told in enumerate(told_S2P, start=1):
        speeds.observe(step, told.ravel().astype(float).tolist())
        if resumes:
            state = json.loads(json.dumps(speeds.state))
            speeds = RankSpeeds(0, RANKS, CPU, LATER)
            speeds.at_resume(state)
        for as_of in range(max(1, step + 1 - LATER), step + 2):
            known = told_S2P[max(0, as_of - 1 - SPEED_STEPS) : as_of - 1]
            expected_P = relative_speeds(known[:, 0], known[:, 1])
            assert speeds.as_of(as_of).tolist() == expected_P.tolist()
