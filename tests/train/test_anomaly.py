"""The detector and the ladder of answers, without a run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from moesys.config.schema import AnomalyConfig
from moesys.train.anomaly import (
    LADDERS,
    LEAST_DEVIATION,
    MOST_WAITING,
    AnomalyState,
    Decision,
    decide,
    due,
    find,
    spike_limit,
)

NAN = float("nan")
ON = AnomalyConfig(policy="skip", sigma=6.0)


def step(
    config: AnomalyConfig,
    state: AnomalyState,
    number: int = 1,
    *,
    loss: float = 2.0,
    grad_norm: float = 1.0,
    first_sample: int | None = None,
    can_roll_back: bool = True,
) -> Decision:
    return decide(
        config,
        state,
        step=number,
        loss=loss,
        grad_norm=grad_norm,
        first_sample=8 * number if first_sample is None else first_sample,
        can_roll_back=can_roll_back,
    )


def after(config: AnomalyConfig, losses, norms) -> AnomalyState:
    """A state that has seen these good steps."""
    state = AnomalyState()
    for loss, norm in zip(losses, norms, strict=True):
        decision = step(config, state, loss=float(loss), grad_norm=float(norm))
        assert decision.finding is None
        state = decision.state
    return state


def noisy(seed: int, count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """A loss that falls as a power of the step, and norms, with a normal deviation of their logarithms."""
    generator = np.random.default_rng(seed)
    steps = np.arange(1, count + 1)
    losses = (2.0 + 8.0 * steps**-0.4) * np.exp(noise * generator.standard_normal(count))
    norms = np.exp(10 * noise * generator.standard_normal(count))
    return losses, norms


@settings(max_examples=3, derandomize=True)
@given(seed=st.integers(0, 2**32), noise=st.sampled_from([0.001, 0.01, 0.05]))
def test_no_false_alarm_in_100_000_steps_of_normal_noise(seed, noise):
    for values in noisy(seed, 100_000, noise):
        windows = sliding_window_view(np.log(values), ON.window_steps)[:-1]
        for chunk in range(0, len(windows), 10_000):
            limits = spike_limit(windows[chunk : chunk + 10_000], ON.sigma)
            judged = values[ON.window_steps + chunk :][: len(limits)]
            assert (judged <= limits).all(), chunk + int(np.argmax(judged > limits))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    noise=st.floats(0.001, 0.05),
    deviations=st.floats(10.0, 1000.0),
    of_loss=st.booleans(),
)
def test_a_spike_of_ten_deviations_is_found_and_one_of_two_is_not(seed, noise, deviations, of_loss):
    losses, norms = noisy(seed, 1128, noise)
    state = after(ON, losses[1000:], norms[1000:])
    deviation = max(noise, LEAST_DEVIATION) if of_loss else max(10 * noise, LEAST_DEVIATION)
    spike, small = (math.exp(min(n * deviation, 500.0)) for n in (deviations, 2.0))
    good = {"loss": 2.0 + 8.0 * 1128**-0.4, "grad_norm": 1.0}
    name = "loss" if of_loss else "grad_norm"
    assert find(ON, state, **good) is None
    assert find(ON, state, **{**good, name: good[name] * small}) is None
    finding = find(ON, state, **{**good, name: good[name] * spike})
    assert finding is not None
    assert finding.reason == f"{name} spikes"
    assert finding.limit is not None
    assert good[name] < finding.limit < good[name] * spike


def test_a_fall_is_no_spike():
    state = after(ON, *noisy(0, 128, 0.01))
    assert find(ON, state, loss=1e-9, grad_norm=0.0) is None


@given(outliers=st.lists(st.floats(-700.0, 700.0), max_size=12), seed=st.integers(0, 2**32))
def test_a_tenth_of_outliers_hardly_moves_the_limit(outliers, seed):
    clean = np.random.default_rng(seed).standard_normal(128) * 0.1
    dirty = [*clean[: 128 - len(outliers)], *outliers]
    ratio = math.log(spike_limit(dirty, 6.0)) / math.log(spike_limit(clean, 6.0))
    assert 0.6 < ratio < 1.8


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_always_found(value, name):
    for config in (AnomalyConfig(), ON):
        finding = find(config, AnomalyState(), **{"loss": 2.0, "grad_norm": 1.0, name: value})
        assert finding is not None
        assert (finding.reason, finding.limit) == (f"{name} is not finite", None)


def test_no_spike_is_looked_for_in_the_warmup_or_without_a_sigma():
    few = after(ON, *noisy(0, ON.warmup_steps - 1, 0.01))
    assert find(ON, few, loss=1e9, grad_norm=1e9) is None
    enough = after(ON, *noisy(0, ON.warmup_steps, 0.01))
    assert find(ON, enough, loss=1e9, grad_norm=1.0) is not None
    off = replace(ON, sigma=0.0)
    state = after(off, *noisy(0, 200, 0.01))
    assert not state.log_losses, "nothing is kept that nothing reads"
    assert find(off, state, loss=1e9, grad_norm=1e9) is None


def test_only_good_steps_are_remembered():
    state = after(ON, *noisy(0, 128, 0.01))
    for loss in (1e6, NAN):
        decision = step(replace(ON, policy="lower_rate"), state, loss=loss)
        assert decision.finding is not None
        assert decision.state.log_losses == state.log_losses
        assert decision.state.log_norms == state.log_norms


@given(
    policy=st.sampled_from(sorted(LADDERS)),
    tries=st.integers(1, 4),
    calm_steps=st.integers(1, 10),
    reinject_after_steps=st.integers(1, 5),
    is_bad=st.lists(st.booleans(), min_size=1, max_size=200),
    can_roll_back=st.booleans(),
)
def test_answers_climb_the_ladder_and_are_bounded(
    policy, tries, calm_steps, reinject_after_steps, is_bad, can_roll_back
):
    config = AnomalyConfig(
        policy=policy,
        tries=tries,
        calm_steps=calm_steps,
        reinject_after_steps=reinject_after_steps,
    )
    rungs = [a for a in LADDERS[policy] if can_roll_back or a != "roll_back"]
    state, answers, good = AnomalyState(), [], 0
    for number, bad in enumerate(is_bad, start=1):
        again = due(state, number)
        first_sample = 8 * number if again is None else again
        decision = step(
            config,
            state,
            number,
            loss=NAN if bad else 2.0,
            first_sample=first_sample,
            can_roll_back=can_roll_back,
        )
        state = decision.state
        assert due(state, number) != again or again is None, "taken is taken"
        if not bad:
            good += 1
            answers = answers if good < calm_steps else []
            assert decision.answer is None
            assert decision.rate in (1.0, config.rate_factor)
            continue
        assert decision.rate is None, "what is not finite is never applied"
        assert decision.answer is not None
        good = 0
        expected = next((r for r in rungs if answers.count(r) < tries), "stop")
        answers.append(expected)
        was_dropped = expected == "reinject" and again is not None
        assert decision.answer == ("skip" if was_dropped else expected)
        assert len(answers) <= tries * (len(rungs) - 1) + 1
        if decision.answer == "stop":
            return


def test_a_batch_comes_back_once_and_when_it_is_due():
    config = replace(ON, policy="reinject", reinject_after_steps=5)
    state = step(config, AnomalyState(), 3, loss=NAN, first_sample=24).state
    assert [due(state, number) for number in (4, 7, 8, 9)] == [None, None, 24, 24]
    good = step(config, state, 8, first_sample=24)
    assert good.rate == 1.0
    assert due(good.state, 99) is None
    bad = step(config, state, 8, loss=NAN, first_sample=24)
    assert bad.answer == "skip"
    assert due(bad.state, 99) is None


def test_not_more_than_so_many_batches_wait():
    config = replace(ON, policy="reinject", tries=10**6, reinject_after_steps=10**6)
    state = AnomalyState()
    for number in range(1, MOST_WAITING + 3):
        decision = step(config, state, number, loss=NAN)
        state = decision.state
    assert len(state.waiting) == MOST_WAITING
    assert decision.answer == "skip"


def test_a_lower_rate_is_for_so_many_steps():
    config = replace(ON, policy="lower_rate", rate_steps=3, rate_factor=0.25)
    state = after(config, *noisy(0, 128, 0.01))
    rates = []
    for loss in (1e6, 2.2, 2.2, 2.2, NAN, 2.2, 2.2, 2.2, 2.2):
        decision = step(config, state, loss=loss)
        state = decision.state
        rates.append(decision.rate)
    assert rates == [0.25, 0.25, 0.25, 1.0, None, 0.25, 0.25, 0.25, 1.0]


@given(seed=st.integers(0, 2**32), anomalies=st.sets(st.integers(0, 60)))
def test_a_state_comes_back_from_json_to_the_bit(seed, anomalies):
    config = AnomalyConfig(policy="reinject", sigma=6.0, window_steps=16, warmup_steps=16)
    losses, norms = noisy(seed, 60, 0.01)
    state = AnomalyState()
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        value = NAN if number in anomalies else float(loss)
        state = step(config, state, number, loss=value, grad_norm=float(norm)).state
    assert AnomalyState.from_json(json.loads(json.dumps(state.to_json()))) == state
