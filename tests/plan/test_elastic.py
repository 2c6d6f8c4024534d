"""A layout for other numbers of ranks: near the configured one, the batch as it was, every rule kept."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.config.elastic import fit_to_world
from moesys.config.errors import ConfigError
from moesys.config.validate import validate
from moesys.plan.elastic import elastic_layout
from tests.train.test_parity import CONFIG

ELASTIC = replace(
    CONFIG,
    train=replace(
        CONFIG.train, micro_batch_tokens=32, elastic=True
    ),  # of 8 samples of 16, 2 at a time
)


def elastic(**parallel):
    return replace(ELASTIC, parallel=replace(CONFIG.parallel, **parallel))


@pytest.mark.parametrize(
    ("parallel", "world_size", "expected"),
    [
        ({"ep": 4}, 4, {}),
        ({"ep": 4}, 8, {"micro_batch_tokens": 16}),
        ({"ep": 4}, 2, {"ep": 2}),
        ({"ep": 4}, 1, {"ep": 1}),
        ({"tp": 2, "ep": 2}, 2, {}),
        # Experts give way before the dense layers do.
        ({"tp": 2, "ep": 4}, 2, {"ep": 2}),
        ({"tp": 2, "ep": 2}, 1, {"tp": 1, "ep": 1}),
        ({"cp": 2, "tp": 2}, 2, {"cp": 1}),
        ({"zero": 1, "dp_shard": 4}, 2, {"dp_shard": 2}),
    ],
)
def test_the_nearest_layout_is_chosen(parallel, world_size, expected):
    config = elastic(**parallel)
    found, told = fit_to_world(config, world_size)
    train = {key: expected.pop(key) for key in ["micro_batch_tokens"] if key in expected}
    assert found == replace(
        config,
        parallel=replace(config.parallel, **expected),
        train=replace(config.train, **train),
    )
    assert bool(told) == (found != config)


def test_what_cannot_be_is_refused_with_the_reasons():
    with pytest.raises(ConfigError, match=r"(?s)global_batch_tokens=128.*dp=3"):
        fit_to_world(elastic(), 3)  # 8 samples on 3 ranks
    with pytest.raises(ConfigError, match=r"parallel\.ep=4"):
        fit_to_world(elastic(ep=4), 6)


def test_without_the_option_the_rules_judge():
    config = elastic(ep=4)
    config = replace(config, train=replace(config.train, elastic=False))
    assert fit_to_world(config, 2) == (config, [])


@settings(max_examples=150)
@given(
    pp=st.sampled_from([1, 2]),
    cp=st.sampled_from([1, 2]),
    tp=st.sampled_from([1, 2]),
    ep=st.sampled_from([1, 2, 4, 8]),
    etp=st.sampled_from([1, 2]),
    world_size=st.integers(1, 16),
)
def test_a_layout_found_keeps_all_rules_and_the_batch(pp, cp, tp, ep, etp, world_size):
    config = elastic(pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)
    try:
        found, _ = fit_to_world(config, world_size)
    except ConfigError:
        assert 8 % world_size, "8 samples go to as many data ranks with every degree at 1"
        return
    validate(found, world_size=world_size)
    assert found.train.global_batch_tokens == config.train.global_batch_tokens
    assert found.train.micro_batch_tokens <= config.train.micro_batch_tokens
    assert found.data == config.data
    for axis in ("pp", "cp", "tp", "ep", "etp"):
        assert getattr(config.parallel, axis) % getattr(found.parallel, axis) == 0


def test_what_works_is_asked_not_assumed():
    assert elastic_layout(elastic(ep=4), 4, lambda config, world_size: False) is None
