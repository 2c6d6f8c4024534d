"""Learning-rate schedules against values worked out by hand from the papers' formulas."""

import itertools
import math

import pytest

from moesys.config.schema import ScheduleConfig
from moesys.optim.schedule import learning_rate


def rates(config: ScheduleConfig, steps: int = 100, peak: float = 2.0) -> list[float]:
    """Index 0 is step 1."""
    return [
        learning_rate(
            config, peak_lr=peak, step=s, total_steps=steps, tokens=s * 1_000_000, batch=512
        )
        for s in range(1, steps + 1)
    ]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant", "infinite"])
def test_warm_up_is_linear_from_zero_and_reaches_the_peak(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=10, decay_steps=20, cooldown_steps=30)
    lr = rates(config)
    assert lr[:10] == pytest.approx([0.2 * s for s in range(1, 11)])
    assert max(lr) == pytest.approx(2.0)


def test_cosine_ends_at_its_floor_and_is_halfway_in_the_middle():
    lr = rates(ScheduleConfig(kind="cosine", warmup_steps=20, min_lr_ratio=0.1))
    assert lr[59] == pytest.approx(2.0 * 0.55)
    assert lr[99] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(lr[20:]))


def test_wsd_is_flat_then_linear():
    lr = rates(ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.0))
    assert set(lr[10:80]) == {2.0}
    assert lr[89] == pytest.approx(1.0)
    assert lr[99] == 0.0


def test_constant_stays():
    assert set(rates(ScheduleConfig(kind="constant"))) == {2.0}


def test_power_follows_the_published_constants_and_is_bounded_by_the_peak():
    config = ScheduleConfig(kind="power", warmup_steps=0, decay_steps=0)
    lr = rates(config, peak=0.02)
    bound = [512 * 4.0 * (s * 1e6) ** -0.51 for s in range(1, 101)]
    assert lr == pytest.approx([min(0.02, b) for b in bound])
    low = rates(config, peak=100.0)
    assert low == pytest.approx(bound)
    decayed = rates(ScheduleConfig(kind="power", decay_steps=50, min_lr_ratio=0.0), peak=100.0)
    assert decayed[74] == pytest.approx(bound[74] / 2)
    assert decayed[99] == 0.0


def test_infinite_cools_down_holds_and_anneals_exponentially():
    config = ScheduleConfig(
        kind="infinite",
        warmup_steps=10,
        cooldown_steps=20,
        constant_lr_ratio=0.4,
        decay_steps=30,
        min_lr_ratio=0.1,
    )
    lr = rates(config, peak=1.0)
    assert lr[19] == pytest.approx(0.7)
    assert lr[29:70] == pytest.approx([0.4] * 41)
    assert lr[84] == pytest.approx(0.4 * math.sqrt(0.1 / 0.4))
    assert lr[99] == pytest.approx(0.1)
