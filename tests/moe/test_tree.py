"""Rows that halving makes: as near as the bound says, fewer than those of hashes, exact where each slot has its own."""

import itertools

import pytest
import torch

from moesys.moe.codecs import LshCodec, TreeCodec
from moesys.moe.codecs.clusters import ClusterCode
from tests.moe.test_lsh import D, E, K, T, make_layer, run, tokens


def residual(code: ClusterCode, x_TD: torch.Tensor) -> float:
    """Of the slots' tokens to their rows, of how all tokens differ: root mean squares."""
    row_N = code.order.row_of_slot_TK.flatten()
    apart_ND = x_TD.repeat_interleave(K, 0) - code.encode(x_TD)[row_N]
    squares = apart_ND[row_N >= 0].square().sum(1).mean()
    return float((squares / (x_TD - x_TD.mean(0)).square().sum(1).mean()).sqrt())


def test_one_row_for_each_slot_is_the_plain_output_bit_for_bit() -> None:
    codec = TreeCodec(d_model=D, error_bound=1e-6)
    for coded, plain in zip(
        run(make_layer(codec), tokens("random")),
        run(make_layer(None), tokens("random")),
        strict=True,
    ):
        assert torch.equal(coded, plain)


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.8])
def test_rows_keep_to_the_bound(bound: float) -> None:
    x_TD, ids_TK = tokens("random").detach(), torch.randint(-1, E, (T, K))
    codec = TreeCodec(d_model=D, error_bound=bound, compensation="none", dimensions=64)
    code = codec.plan(x_TD, ids_TK, E)
    assert residual(code, x_TD) <= 1.2 * bound, "a sketch tells distances nearly"
    again = codec.plan(x_TD, ids_TK, E)
    assert torch.equal(code.order.row_of_slot_TK, again.order.row_of_slot_TK)
    ends = code.order.first_member_X.tolist()
    slots = [code.order.member_slots_M[a:b].tolist() for a, b in itertools.pairwise(ends)]
    assert sorted(itertools.chain(*slots)) == (ids_TK.flatten() >= 0).nonzero()[:, 0].tolist()
    for members, expert in zip(slots, code.ids_C1[:, 0].tolist(), strict=True):
        assert {int(ids_TK.flatten()[slot]) for slot in members} == {expert}


def test_as_near_rows_are_fewer_than_hashes_make() -> None:
    """Of tokens that lie near a surface of three dimensions in a space of 64."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(600, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    x_TD += 0.1 * torch.randn(600, 64, generator=generator)
    ids_TK = torch.rand(600, E, generator=generator).argsort(1)[:, :K]
    of_hashes = LshCodec(d_model=64, error_bound=0.35, compensation="none").plan(x_TD, ids_TK, E)
    of_tree = TreeCodec(d_model=64, error_bound=0.35, compensation="none").plan(x_TD, ids_TK, E)
    assert residual(of_tree, x_TD) < 0.35
    assert len(of_tree.ids_C1) < 0.7 * len(of_hashes.ids_C1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dimensions": 0}, "dimensions=0 must be at least 1"),
        ({"error_bound": 0.0}, "error_bound=0.0 must be above 0"),
        ({"compensation": "all"}, "compensation='all' must be residual, none or slope"),
    ],
)
def test_wrong_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TreeCodec(d_model=D, **options)


def test_no_token() -> None:
    code = TreeCodec(d_model=D).plan(torch.zeros(0, D), torch.zeros(0, K, dtype=torch.int64), E)
    assert code.ids_C1.shape == (0, 1)
    assert code.decode(*(torch.zeros(0, D),) * 3, torch.zeros(0, K)).shape == (0, D)


@pytest.mark.parametrize("kind", [LshCodec, TreeCodec])
def test_slots_without_an_expert_are_in_no_row_and_no_pair(kind: type) -> None:
    """They come last in order of code, after a last row of a single slot; or there is no other."""
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(2))
    x_TD[: T // 2] = x_TD[0] + 0.01 * x_TD[: T // 2]
    ids_TK = torch.full((T, K), -1)
    ids_TK[: T // 2, 0] = 0  # one wide row
    ids_TK[-1, 1] = E - 1  # one slot
    code = kind(d_model=D).plan(x_TD, ids_TK, E)
    has_row_TK = code.order.row_of_slot_TK >= 0
    assert torch.equal(has_row_TK, ids_TK >= 0)
    assert (code.pairs_E2[0] >= 0).all()
    assert (code.pairs_E2[1:] == -1).all(), "the last expert's row has one member"
    assert len(code.ids_C1) == int(code.order.row_of_slot_TK.max()) + 1
    none = kind(d_model=D).plan(x_TD, torch.full((T, K), -1), E)
    assert none.ids_C1.shape == (0, 1)
    empty = torch.zeros(0, D)
    assert (none.decode(empty, empty, x_TD, torch.ones(T, K)) == 0).all()
