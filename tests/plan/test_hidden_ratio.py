"""Ratios that nobody waits for, by their definition and by hand; how many tokens and ranks they make of a device's memory."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.config.compose import compose
from moesys.plan.activations import token_bytes
from moesys.plan.batch.cost import AttentionKind, BatchCosts, costs_of
from moesys.plan.batch.fit import least_ranks
from moesys.plan.costs import head_flops_per_token
from moesys.plan.offload import HostLink, OffloadCosts, away_bytes, layer_costs

BY_HAND = OffloadCosts(
    link=HostLink(out_bytes_per_s=10.0, back_bytes_per_s=10.0, start_s=2.0),
    costs=BatchCosts(attention=(AttentionKind(pair_s=3.0),), token_s=3.0),
    layers=5,
    token_bytes=100.0,
)
"""A forward of n tokens is n (n + 1) / 2 + n seconds and leaves 100 n bytes; copies begin in 10 seconds."""


def test_ratios_by_hand() -> None:
    """3 tokens compute for 9 s, less than copies take to begin; 5 for 20, so that 100 bytes of 500 leave in the 10 s after that."""
    assert BY_HAND.hidden_ratio([3], [1]) == 0
    assert BY_HAND.hidden_ratio([5], [1]) == pytest.approx(10 * (20 - 10) / 500)
    assert BY_HAND.hidden_ratio([5, 3], [1, 1]) == pytest.approx(10 * (20 + 9 - 10) / 800)
    assert BY_HAND.hidden_ratio([10], [2]) == pytest.approx(10 * (65 / 2 - 10) / 500)
    assert BY_HAND.hidden_ratio([20], [1]) == 1
    assert BY_HAND.hidden_ratio([], []) == BY_HAND.hidden_ratio([0], [1]) == 0


def test_the_way_back_has_twice_the_time() -> None:
    slow = replace(BY_HAND, link=replace(BY_HAND.link, back_bytes_per_s=1.0))
    assert slow.hidden_ratio([5], [1]) == pytest.approx((40 - 10) / 500)


def test_two_layers_stay_whole() -> None:
    """Of five layers, at a ratio of 1 the memory of two: half as many tokens again, and again."""
    assert BY_HAND.resident_share(1.0) == pytest.approx(2 / 5)
    assert BY_HAND.capacity_tokens(100, 1.0) == 250
    assert BY_HAND.capacity_tokens(100, 0.5) == 142
    assert BY_HAND.capacity_tokens(100, 0.0) == 100
    few = replace(BY_HAND, layers=2)
    assert few.capacity_tokens(100, 1.0) == 100
    beside = replace(BY_HAND, other_token_bytes=20.0)
    assert beside.capacity_tokens(100, 1.0) == 200


def costs() -> st.SearchStrategy[OffloadCosts]:
    rates = st.floats(1e9, 1e11)
    return st.builds(
        OffloadCosts,
        link=st.builds(
            HostLink,
            out_bytes_per_s=rates,
            back_bytes_per_s=rates,
            start_s=st.floats(0, 1e-3),
        ),
        costs=st.builds(
            BatchCosts,
            attention=st.tuples(
                st.builds(
                    AttentionKind, pair_s=st.floats(0, 1e-9), window=st.none() | st.just(4096)
                )
            ),
            token_s=st.floats(0, 1e-4),
        ),
        layers=st.integers(1, 100),
        token_bytes=st.floats(1e3, 1e8),
        other_token_bytes=st.floats(0, 1e7),
    )


batches = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 64)), max_size=8)


@given(costs(), batches)
def test_nobody_waits_and_no_more_could_leave(costs: OffloadCosts, pieces: list) -> None:
    """Either way, of all layers: copies begin, bytes travel, within what the layers compute."""
    lengths, sizes = [n for n, _ in pieces], [size for _, size in pieces]
    ratio = costs.hidden_ratio(lengths, sizes)
    assert 0 <= ratio <= 1
    work_s = sum(float(costs.costs.work_s(n)) / size for n, size in pieces)
    num_bytes = costs.token_bytes * sum(n / size for n, size in pieces)
    link = costs.link
    begun_s = costs.layers * link.start_s
    ways = (
        (work_s / 3, link.out_bytes_per_s),
        (2 * work_s / 3, link.back_bytes_per_s),
    )
    left_s = min(spare_s - begun_s - ratio * num_bytes / rate for spare_s, rate in ways)
    if ratio > 0:
        assert left_s >= -1e-9 * work_s
    if num_bytes and ratio < 1:
        assert left_s <= 1e-9 * work_s


@given(costs(), st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 64))
def test_longer_sequences_and_faster_links_let_more_leave(
    costs: OffloadCosts, length: int, more: int, size: int
) -> None:
    ratio = costs.hidden_ratio([length], [size])
    assert costs.hidden_ratio([length + more], [size]) >= ratio * (1 - 1e-9)
    for way in ("out_bytes_per_s", "back_bytes_per_s"):
        faster = replace(costs.link, **{way: 2 * getattr(costs.link, way)})
        assert replace(costs, link=faster).hidden_ratio([length], [size]) >= ratio


@given(costs(), st.integers(1, 10**6))
def test_a_ring_without_a_start_has_the_ratio_of_the_whole_sequence(
    costs: OffloadCosts, length: int
) -> None:
    """Work and bytes are shared out alike."""
    costs = replace(costs, link=replace(costs.link, start_s=0.0))
    alone, shared = (costs.hidden_ratio([length], [size]) for size in (1, 7))
    assert shared == pytest.approx(alone)


@given(costs(), st.integers(1, 10**5), st.floats(0, 1))
def test_capacity_is_what_memory_holds(costs: OffloadCosts, capacity: int, ratio: float) -> None:
    """What the layers keep of so many tokens, but for what is away, is what stays of `capacity` tokens."""
    tokens = costs.capacity_tokens(capacity, ratio)
    one = costs.token_bytes / costs.layers

    def on_device(tokens: int) -> float:
        blocks = [one * tokens] * costs.layers
        other = costs.other_token_bytes * tokens
        return sum(blocks) - away_bytes([(blocks, 1)], ratio) + other

    memory = (costs.token_bytes + costs.other_token_bytes) * capacity
    assert on_device(tokens) <= memory * (1 + 1e-9)
    assert on_device(tokens + 1) >= memory * (1 - 1e-9)


@given(costs(), st.integers(1, 10**5), st.integers(16, 10**4))
def test_a_ring_is_no_larger_and_has_memory(
    costs: OffloadCosts, length: int, capacity: int
) -> None:
    size, ratio = costs.ring(length, capacity)
    without = least_ranks(length, capacity)
    assert 1 <= size <= without
    assert ratio == (0 if size == without else costs.hidden_ratio([length], [size]))
    paper = math.ceil(costs.resident_share(ratio) * length / capacity * (1 - 1e-9))
    assert paper <= size
    # Slices of a sequence are equal but for two tokens.
    if without - size > 1 and not costs.link.start_s:
        assert size <= math.ceil(costs.resident_share(ratio) * length / (capacity - 2)) + 1


TABLE = {
    "none": [0, 0.10, 0.14, 0.38, 0.70, 1, 1],
    "selective": [0, 0.19, 0.26, 0.71, 1, 1, 1],
}
RANKS = {"none": [1, 1, 2, 6, 7, 5, 20], "selective": [1, 1, 2, 4, 4, 8, 31]}


@pytest.mark.parametrize("recompute", TABLE)
def test_a_long_sequence_wants_fewer_ranks(recompute: str) -> None:
    """The table of docs/numerics.md: Qwen3-30B-A3B, 8192 tokens of memory."""
    words = ["train.dtype=bf16", f"train.recompute={recompute}", "parallel.ep=8"]
    config = compose(["model=qwen3_30b_a3b", *words])
    costs = OffloadCosts(
        link=HostLink(out_bytes_per_s=5e10, back_bytes_per_s=5e10, start_s=2e-4),
        costs=layer_costs(config.model, 4.5e14),
        layers=config.model.num_layers,
        token_bytes=token_bytes(config),
        other_token_bytes=8 * config.model.vocab_size,
    )
    lengths = 2**9, 2**13, 2**14, 2**16, 2**17, 2**18, 2**20
    without = [least_ranks(length, 8192) for length in lengths]
    assert without == [1, 1, 2, 8, 16, 32, 128]
    ratios = [
        costs.hidden_ratio([length], [size]) for length, size in zip(lengths, without, strict=True)
    ]
    assert [round(ratio, 2) for ratio in ratios] == TABLE[recompute]
    assert [costs.ring(length, 8192)[0] for length in lengths] == RANKS[recompute]


def test_layers_are_all_but_the_head() -> None:
    model = compose(["model=qwen3_30b_a3b"]).model
    layers, whole = layer_costs(model, 1e12), costs_of(model, 1e12)
    assert layers.attention == whole.attention
    head_s = 3 * head_flops_per_token(model) / 1e12
    assert layers.token_s == pytest.approx(whole.token_s - head_s)


def test_what_is_away_by_hand() -> None:
    """Two neighbours are whole; with micro-batches in flight the last and the first block are neighbours, and a last one is back."""
    blocks = [4.0, 1.0, 2.0, 6.0]
    assert away_bytes([(blocks, 1)], 0.5) == 0.5 * (13 - 8)
    assert away_bytes([(blocks, 3)], 0.5) == 0.5 * (3 * 13 - (6 + 4) - 6)
    # Of two stages one block may be followed by one of the other, and each has its last one back.
    assert away_bytes([(blocks, 2), ([3.0, 5.0], 2)], 1.0) == 26 + 16 - (6 + 4) - 6 - 5
    assert away_bytes([(blocks, 2), ([9.0, 1.0], 1)], 1.0) == 26 + 10 - (6 + 9) - 6
    assert away_bytes([([9.0], 1)], 1.0) == away_bytes([([9.0], 2)], 1.0) == 0
