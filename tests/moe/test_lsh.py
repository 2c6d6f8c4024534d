"""Tokens that travel as their mean: what is exact, what is bounded, and all gradients.

Shapes: T tokens, D model, E experts, K experts per token.
"""

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesys.config.schema import BalanceConfig, ComponentConfig, MoEConfig
from moesys.moe.codecs import LshCodec
from moesys.moe.codecs.slopes import mean_square_residual
from moesys.moe.compression import Compression
from moesys.moe.layer import MoELayer

T, D, E, K = 60, 16, 4, 2
CONFIG = MoEConfig(
    num_experts=E,
    top_k=K,
    d_expert=24,
    router=ComponentConfig(target="moesys.moe.routers.TopKRouter"),
    balance=BalanceConfig(global_loss_coef=0.01),
)
as_in_paper = functools.partial(LshCodec, error_bound=None, compensation="residual")
"""All hashes for every row, unless said otherwise."""


def make_layer(codec: LshCodec | None) -> MoELayer:
    torch.manual_seed(1)
    layer = MoELayer(CONFIG, D)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for experts in layer.experts.classes():
        experts.backend = "loop"
    layer.compression = Compression(codec=codec)
    return layer


def tokens(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(T, D, generator=generator)
    middles = torch.randn(5, D, generator=generator)
    near_TD = middles[torch.randint(0, 5, (T,), generator=generator)]
    x_TD = {
        "random": x_TD,
        "clustered": near_TD + 0.01 * x_TD,
        "equal in groups": near_TD,
        "all equal": x_TD[:1].expand(T, D),
    }[kind]
    return x_TD.clone().requires_grad_()


def run(layer: MoELayer, x_TD: Tensor) -> Iterator[Tensor]:
    """Output, gradient of x, gradients of all parameters."""
    y_TD, losses, _ = layer(x_TD, seq_len=T)
    grad_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3)).to(y_TD)
    leaves = [x_TD, *layer.parameters()]
    loss = (y_TD * grad_TD).sum() + sum(losses)
    yield y_TD.detach()
    yield from torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("compensation", ["residual", "none"])
def test_rows_of_one_token_each_are_exact(compensation: str) -> None:
    """Output bit for bit."""
    codec = as_in_paper(d_model=D, hashes=8, dimensions=16, compensation=compensation)
    coded = list(run(make_layer(codec), tokens("random")))
    plain = list(run(make_layer(None), tokens("random")))
    code = codec.plan(tokens("random"), torch.zeros(T, 1, dtype=torch.int64), 1)
    assert code.ids_C1.shape == (T, 1)
    assert torch.equal(coded[0], plain[0])
    for ours, theirs in zip(coded[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["equal in groups", "all equal"])
def test_equal_tokens_lose_nothing(kind: str) -> None:
    """One row for all of an expert's that are equal, the numbers of each by itself."""
    codec = as_in_paper(d_model=D, hashes=4)
    coded = list(run(make_layer(codec), tokens(kind)))
    plain = list(run(make_layer(None), tokens(kind)))
    torch.testing.assert_close(coded[0], plain[0], rtol=1e-4, atol=1e-4)
    # A token's own gradient is shared out among its equals; that of parameters is the same, but for the router's, which
    # sees the tokens' own.
    for ours, theirs in zip(coded[2:], plain[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def result(layer: MoELayer, expert: int, row_D: Tensor) -> Tensor:
    (experts,) = layer.experts.classes()
    gate, up = experts.gate_up[expert].unbind(0)
    return experts.down[expert] @ (torch.nn.functional.silu(gate @ row_D) * (up @ row_D))


def obvious(
    layer: MoELayer,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    codec: LshCodec,
    slope: float | None,
    detach: bool,
) -> Tensor:
    """Equation by equation, a cluster at a time (papers: 3.2), differentiable by autograd. A slope that is None is fitted for
    each expert, where the two of a pair are far enough apart."""
    code = codec.plan(x_TD, ids_TK, E)
    y_TD = torch.zeros_like(x_TD)
    row_of_slot = code.order.row_of_slot_TK.flatten()
    members_C = [(row_of_slot == row).nonzero()[:, 0] // K for row in range(len(code.ids_C1))]
    middles_C = [x_TD[members].mean(0) for members in members_C]

    shared = [
        (x_TD[members] - middle_D).square().sum(1)
        for members, middle_D in zip(members_C, middles_C, strict=True)
        if len(members) > 1
    ]
    nearest = torch.cat(shared).mean().sqrt().detach() / 2
    slopes_E = [slope or 0.0] * E
    if slope is None:
        assert code.pairs_E2 is not None
        for expert, (alone, others) in enumerate(code.pairs_E2.tolist()):
            if alone < 0:
                continue
            apart_D = (middles_C[alone] - middles_C[others]).detach()
            moved_D = result(layer, expert, middles_C[alone]) - result(
                layer, expert, middles_C[others]
            )
            if apart_D.norm() >= nearest:
                slopes_E[expert] = float(moved_D.detach() @ apart_D / (apart_D @ apart_D))
        assert any(slopes_E)
    for row, (members, middle_D) in enumerate(zip(members_C, middles_C, strict=True)):
        slots = (row_of_slot == row).nonzero()[:, 0]
        expert = int(code.ids_C1[row])
        fixed_D = middle_D.detach() if detach else middle_D
        moved = result(layer, expert, middle_D) + slopes_E[expert] * (x_TD[members] - fixed_D)
        weights = weights_TK.flatten()[slots, None]
        y_TD = y_TD.index_add(0, members, weights * moved)
    return y_TD


@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(
    ("compensation", "slope"), [("residual", 1.0), ("none", 0.0), ("slope", None)]
)
def test_gradients_are_those_of_the_equations(
    kind: str, detach: bool, compensation: str, slope: float | None
) -> None:
    codec = as_in_paper(
        d_model=D, hashes=2, dimensions=2, compensation=compensation, detach_residual=detach
    )
    layer = make_layer(codec)
    x_TD = tokens(kind)
    y_TD, _, _ = layer(x_TD, seq_len=T)
    routed = layer.router(x_TD)
    ids_TK, weights_TK = routed.topk_ids_TK, routed.topk_weights_TK
    expected_TD = obvious(layer, x_TD, ids_TK, weights_TK, codec, slope, detach)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-6)
    grad_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(4))
    leaves = [x_TD, *layer.parameters()]
    found = torch.autograd.grad(y_TD, leaves, grad_TD)
    expected = torch.autograd.grad(expected_TD, leaves, grad_TD)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    # And in fp64, which a router's weights are not.
    layer, x_TD, grad_TD = layer.double(), x_TD.detach().double().requires_grad_(), grad_TD.double()
    weights_TK = weights_TK.detach().double().requires_grad_()
    code = codec.plan(x_TD, ids_TK, E)
    rows_CD = code.encode(x_TD)
    of_rows = zip(code.ids_C1[:, 0].tolist(), rows_CD, strict=True)
    out_CD = torch.stack([result(layer, expert, row_D) for expert, row_D in of_rows])
    y_TD = code.decode(out_CD, rows_CD, x_TD, weights_TK)
    expected_TD = obvious(layer, x_TD, ids_TK, weights_TK, codec, slope, detach)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-11, atol=1e-12)
    leaves = [x_TD, weights_TK, *layer.experts.parameters()]
    found = torch.autograd.grad(y_TD, leaves, grad_TD)
    expected = torch.autograd.grad(expected_TD, leaves, grad_TD)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_more_hashes_make_more_rows() -> None:
    x_TD, ids_TK = tokens("random"), torch.randint(0, E, (T, K))
    counts = [
        as_in_paper(d_model=D, hashes=hashes, dimensions=2).plan(x_TD, ids_TK, E).ids_C1.shape[0]
        for hashes in range(1, 7)
    ]
    assert counts == sorted(counts)
    assert counts[0] <= 4 * E < counts[-1] <= T * K


@pytest.mark.parametrize("most_rows", [0.05, 0.2, 0.5, 0.9])
def test_most_rows_is_kept_to_with_as_many_hashes_as_it_allows(most_rows: float) -> None:
    x_TD, ids_TK = tokens("random"), torch.randint(-1, E, (T, K))
    slots = int((ids_TK >= 0).sum())
    codec = as_in_paper(d_model=D, hashes=6, dimensions=2, most_rows=most_rows)
    found = codec.plan(x_TD, ids_TK, E)
    codec.most_rows = 1.0
    codes_T, _ = codec._codes(x_TD)
    by_hashes = []
    for hashes in range(1, 7):
        prefix_T = codes_T // 4 ** (6 - hashes)
        pairs = {(int(e), int(prefix_T[t])) for t, ids in enumerate(ids_TK) for e in ids if e >= 0}
        by_hashes.append(len(pairs))
    allowed = [count for count in by_hashes if count <= most_rows * slots]
    assert found.ids_C1.shape[0] == max(allowed, default=by_hashes[0])


def test_what_all_tokens_have_in_common_does_not_hide_what_they_differ_in() -> None:
    """Differences of a hundredth: seen by hashes of what is centered alone."""
    common_D = 100 * torch.randn(D, generator=torch.Generator().manual_seed(5))
    x_TD, ids_T1 = tokens("random").detach() + common_D, torch.zeros(T, 1, dtype=torch.int64)
    plain, centered = (
        as_in_paper(d_model=D, hashes=2, centered=c).plan(x_TD, ids_T1, 1).ids_C1.shape[0]
        for c in (False, True)
    )
    assert plain <= 5
    assert centered > 30


def test_a_fitted_slope_makes_experts_that_scale_exact() -> None:
    """E(x) = a x of a factor for each expert: then tokens get what they would have had, however few rows there are."""
    codec = as_in_paper(d_model=D, hashes=1, dimensions=2, compensation="slope")
    x_TD, ids_TK = tokens("random").detach(), torch.randint(-1, E, (T, K))
    code = codec.plan(x_TD, ids_TK, E)
    assert code.ids_C1.shape[0] <= 5 * E
    factors_E = torch.tensor([0.0, -0.3, 1.0, 2.5])
    weights_TK = torch.rand(T, K)
    rows_CD = code.encode(x_TD)
    found_TD = code.decode(factors_E[code.ids_C1] * rows_CD, rows_CD, x_TD, weights_TK)
    scale_TK = torch.where(ids_TK >= 0, factors_E[ids_TK], 0) * weights_TK
    torch.testing.assert_close(found_TD, scale_TK.sum(1, keepdim=True) * x_TD)


@pytest.mark.parametrize("kind", ["random", "clustered", "all equal"])
def test_a_pair_is_a_token_and_the_others_of_its_row(kind: str) -> None:
    codec = as_in_paper(d_model=D, hashes=1, dimensions=2, compensation="slope")
    plain = as_in_paper(d_model=D, hashes=1, dimensions=2)
    x_TD = tokens(kind).detach()
    ids_TK = torch.randint(-1, E - 1, (T, K))  # none for the last expert
    before, after = (c.plan(x_TD, ids_TK, E) for c in (plain, codec))
    assert after.ids_C1.shape[0] == before.ids_C1.shape[0] + E - 1
    assert after.pairs_E2[-1].tolist() == [-1, -1]
    sizes_C = before.order.first_member_X.diff()
    for expert, (alone, others) in enumerate(after.pairs_E2[:-1].tolist()):
        begin, end = after.order.first_member_X[alone : alone + 2].tolist()
        assert end - begin == 1
        slot = int(after.order.member_slots_M[begin])
        row = int(before.order.row_of_slot_TK.flatten()[slot])
        assert sizes_C[row] == sizes_C[before.ids_C1[:, 0] == expert].max()
        members = [int(s) for s in (before.order.row_of_slot_TK.flatten() == row).nonzero()]
        begin, end = after.order.first_member_X[others : others + 2].tolist()
        assert after.order.member_slots_M[begin:end].tolist() == [m for m in members if m != slot]
        assert slot in members


def test_two_that_are_near_give_no_slope() -> None:
    """Rounding of 1 % of a result, over a thousandth of what tokens are apart, would be a slope of ten."""
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(5))
    x_TD[: T // 2] = x_TD[0] + 1e-3 * x_TD[: T // 2]  # the largest row
    ids_T1 = torch.zeros(T, 1, dtype=torch.int64)
    codec = as_in_paper(d_model=D, hashes=2, dimensions=4, compensation="slope")
    code = codec.plan(x_TD, ids_T1, 1)
    rows_CD = code.encode(x_TD)
    first, second = code.pairs_E2[0].tolist()
    apart_D = rows_CD[first] - rows_CD[second]
    out_CD = rows_CD.clone()
    out_CD[first] += 0.05 * apart_D / apart_D.norm()
    found_TD = code.decode(out_CD, rows_CD, x_TD, torch.ones(T, 1))
    assert torch.equal(found_TD, out_CD[code.order.row_of_slot_TK[:, 0]])
    slope = (out_CD[first] - out_CD[second]) @ apart_D / (apart_D @ apart_D)
    assert slope > 5, "what it would have been"


def test_mean_square_residual_is_that_of_the_slots_that_share_a_row() -> None:
    x_TD, ids_TK = tokens("random").detach().double(), torch.randint(-1, E, (T, K))
    code = as_in_paper(d_model=D, hashes=2, dimensions=2).plan(x_TD, ids_TK, E)
    means_CD, row_N = code.encode(x_TD), code.order.row_of_slot_TK.flatten()
    sizes_C = code.order.first_member_X.diff()
    shared = [n for n in range(T * K) if row_N[n] >= 0 and sizes_C[row_N[n]] > 1]
    expected = sum(float((x_TD[n // K] - means_CD[row_N[n]]).square().sum()) for n in shared)
    found = mean_square_residual(x_TD, code.order)
    assert float(found) == pytest.approx(expected / len(shared))


def test_without_a_row_of_two_there_is_no_slope() -> None:
    codec = as_in_paper(d_model=D, hashes=8, dimensions=16, compensation="slope")
    coded, plain = (list(run(make_layer(c), tokens("random"))) for c in (codec, None))
    assert torch.equal(coded[0], plain[0])
    empty = codec.plan(torch.zeros(0, D), torch.zeros(0, K, dtype=torch.int64), E)
    assert empty.decode(*(torch.zeros(0, D),) * 3, torch.zeros(0, K)).shape == (0, D)


@pytest.mark.parametrize("bound", [0.0, 0.3, 0.6, 0.9])
def test_an_error_bound_is_kept_with_the_fewest_hashes(bound: float) -> None:
    """Of the mapped tokens, row by row; a row has no more hashes than its parent, which was too wide."""
    x_TD, ids_TK = tokens("random").detach(), torch.randint(-1, E, (T, K))
    codec = as_in_paper(d_model=D, hashes=4, dimensions=2, error_bound=bound)
    order = codec.plan(x_TD, ids_TK, E).order
    sketch_TX = x_TD @ codec._maps.like(x_TD)
    sketch_TX = sketch_TX - sketch_TX.mean(0)

    def relative(slots: list[int]) -> float:
        members = sketch_TX[torch.tensor(slots) // K]
        spread = (members - members.mean(0)).square().sum(1).mean()
        return float((spread / sketch_TX.square().sum(1).mean()).sqrt())

    codec.error_bound = None
    digits = codec._codes(x_TD)[0][:, None].expand_as(ids_TK)
    ends = order.first_member_X.tolist()
    rows = [order.member_slots_M[a:b].tolist() for a, b in itertools.pairwise(ends)]
    assert (
        sorted(slot for row in rows for slot in row)
        == (ids_TK.flatten() >= 0).nonzero()[:, 0].tolist()
    )
    assert all(len(row) == 1 or relative(row) <= bound + 1e-5 for row in rows)
    flat_ids, flat_codes = ids_TK.flatten(), digits.flatten()
    for row in rows:
        # One hash less would have taken in too much: the widest row of its own that would do is this one.
        for hashes in range(1, 5):
            prefix = flat_codes // 4 ** (4 - hashes)
            parent = ((flat_ids == flat_ids[row[0]]) & (prefix == prefix[row[0]])).nonzero()[:, 0]
            if relative(parent.tolist()) <= bound - 1e-5:
                assert row == parent.tolist()
                break


def test_what_tokens_have_in_common_changes_no_rows_in_bf16() -> None:
    generator = torch.Generator().manual_seed(6)
    middles_ND, common_D = (
        torch.randn(20, D, generator=generator),
        torch.randn(D, generator=generator),
    )
    apart_TD = middles_ND.repeat(20, 1) + 0.35 * torch.randn(400, D, generator=generator)
    x_TD, ids_T1 = (apart_TD + 64 * common_D).bfloat16().float(), torch.zeros(400, 1).long()
    codec = LshCodec(d_model=D, error_bound=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (codec.plan(x, ids_T1, 1).order for x in (x_TD, x_TD - x_TD.mean(0)))
    assert torch.equal(first.row_of_slot_TK, second.row_of_slot_TK)


def test_rows_by_an_error_bound() -> None:
    x_TD, ids_TK = tokens("clustered").detach(), torch.rand(T, E).argsort(1)[:, :K]
    counts = [
        as_in_paper(d_model=D, hashes=6, error_bound=b).plan(x_TD, ids_TK, E).ids_C1.shape[0]
        for b in (0.0, 0.05, 2.0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == T * K, "each by itself"
    assert counts[1] <= 5 * E, "five middles"


def test_tokens_of_other_lengths_do_not_share_a_row() -> None:
    x_TD = tokens("all equal").detach() * torch.tensor([1.0, 1.1, 8.0]).repeat(T // 3)[:, None]
    ids_T1 = torch.zeros(T, 1, dtype=torch.int64)
    alike, apart = (
        as_in_paper(d_model=D, hashes=2, norm_factor=factor, centered=False)
        .plan(x_TD, ids_T1, 1)
        .order
        for factor in (None, 4.0)
    )
    assert alike.row_of_slot_TK.unique().numel() == 1
    rows_3 = apart.row_of_slot_TK[:3, 0].tolist()
    assert rows_3[0] != rows_3[2]
    assert apart.row_of_slot_TK.unique().numel() <= 3


def test_a_recomputation_recalls_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts nothing again."""
    codec = as_in_paper(d_model=D, hashes=2)
    layer, again = make_layer(codec), make_layer(codec)
    x_TD, y_TD = tokens("clustered"), tokens("clustered")
    plain = list(run(layer, x_TD))
    calls = []
    planned = codec.plan
    monkeypatch.setattr(codec, "plan", lambda *args: calls.append(1) or planned(*args))

    def forward(x_TD: Tensor) -> Tensor:
        return again(x_TD, seq_len=T)[0]

    out_TD = checkpoint(forward, y_TD, use_reentrant=False, context_fn=again.memory.passes)
    assert isinstance(out_TD, Tensor)
    grad_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(out_TD, [y_TD, again.experts.classes()[0].down], grad_TD)
    assert len(calls) == 1
    assert torch.equal(out_TD, plain[0])
    assert found[1].abs().sum() > 0


def test_an_evaluation_has_each_slots_own_row() -> None:
    layer, plain = make_layer(as_in_paper(d_model=D, hashes=1)), make_layer(None)
    x_TD = tokens("clustered")
    assert not torch.equal(layer(x_TD, seq_len=T)[0], plain(x_TD, seq_len=T)[0])
    layer.eval()
    plain.eval()
    assert torch.equal(layer(x_TD, seq_len=T)[0], plain(x_TD, seq_len=T)[0])


def test_the_load_counts_tokens() -> None:
    layer, plain = make_layer(as_in_paper(d_model=D, hashes=1)), make_layer(None)
    for each in (layer, plain):
        each(tokens("clustered"), seq_len=T)
    assert torch.equal(*(each.load.take(torch.device("cpu")) for each in (layer, plain)))


def test_the_same_rows_in_every_process_and_others_in_every_layer() -> None:
    x_TD, ids_TK = tokens("random"), torch.zeros(T, 1, dtype=torch.int64)
    rows = [
        as_in_paper(d_model=D, hashes=1, layer=layer, seed=seed).plan(x_TD, ids_TK, 1).order
        for layer, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    same, other_layer, other_seed = (
        torch.equal(rows[0].row_of_slot_TK, order.row_of_slot_TK) for order in rows[1:]
    )
    assert same
    assert not other_layer
    assert not other_seed


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="hashes=0 and dimensions=8 must be at least 1"):
        as_in_paper(d_model=D, hashes=0)
    with pytest.raises(ValueError, match="codes of 64 bits"):
        as_in_paper(d_model=D, hashes=16, dimensions=8)
    with pytest.raises(ValueError, match="most_rows=0 must be above 0"):
        as_in_paper(d_model=D, most_rows=0)
    with pytest.raises(ValueError, match="codes of 66 bits"):
        as_in_paper(d_model=D, hashes=15, dimensions=8, norm_factor=2.0)
    with pytest.raises(ValueError, match="both say how many hashes count"):
        LshCodec(d_model=D, most_rows=0.5)
    with pytest.raises(ValueError, match="norm_factor=1 must be above 1"):
        as_in_paper(d_model=D, norm_factor=1)
    with pytest.raises(ValueError, match="error_bound=-1 must be at least 0"):
        as_in_paper(d_model=D, error_bound=-1)
    x_TD = tokens("random").detach()
    x_TD[7, 3] = float("nan")
    with pytest.raises(RuntimeError, match="row 7 is not finite"):
        as_in_paper(d_model=D).plan(x_TD, torch.zeros(T, 1, dtype=torch.int64), 1)
