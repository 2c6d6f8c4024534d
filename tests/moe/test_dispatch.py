"""Dispatch then combine is the identity, on one rank and over ranks.

Shapes: T tokens, D model, E experts, K experts per token.
"""

import pytest
import torch
import torch.distributed as dist

from moesys.moe.dispatch import ExpertParallelDispatcher, LocalDispatcher
from moesys.moe.routing import RoutingResult
from moesys.parallel.exchange import FlatExchange
from moesys.testing.ranks import run_ranks

D = 5

# name -> (tokens per rank as a function of rank, E, K, which experts)
CASES = {
    "random": (lambda rank: 9, 8, 2, "random"),
    "tokens differ per rank": (lambda rank: 4 + 3 * rank, 8, 3, "random"),
    "no token on rank 0": (lambda rank: 6 * rank, 4, 2, "random"),
    "no token anywhere": (lambda rank: 0, 4, 2, "random"),
    "one token": (lambda rank: 1, 4, 1, "random"),
    "all tokens to one expert": (lambda rank: 7, 8, 1, "first"),
    "every expert": (lambda rank: 5, 4, 4, "random"),
    "experts without rows": (lambda rank: 6, 8, 2, "last two"),
    "slots without an expert": (lambda rank: 9, 8, 3, "dropped"),
    "only slots without an expert": (lambda rank: 3, 4, 2, "none"),
}


def make_routing(rank: int, case: str) -> tuple[torch.Tensor, RoutingResult, int]:
    """x_TD (fp64) and a routing whose weights sum to one per token (over slots with an expert)."""
    tokens_of, num_experts, top_k, kind = CASES[case]
    tokens = tokens_of(rank)
    generator = torch.Generator().manual_seed(17 + rank)
    order = torch.rand(tokens, num_experts, generator=generator)
    ids = order.argsort(dim=1)[:, :top_k]
    if kind == "first":
        ids = torch.zeros_like(ids)
    if kind == "last two":
        ids = torch.tensor([num_experts - 2, num_experts - 1]).expand(tokens, 2).clone()
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    if kind in ("dropped", "none"):
        dropped = torch.rand(tokens, top_k, generator=generator) < 0.4
        dropped[:, 1:] |= kind == "none"
        dropped[:, 0] = kind == "none"
        ids, weights = ids.masked_fill(dropped, -1), weights.masked_fill(dropped, 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    x_TD = torch.randn(tokens, D, generator=generator)
    zeros = torch.zeros(tokens, num_experts)
    routing = RoutingResult(
        topk_ids_TK=ids, topk_weights_TK=weights, logits_TE=zeros, probs_TE=zeros
    )
    return x_TD, routing, num_experts


def _there_and_back(
    rank: int, size: int, case: str, local: bool, padded_rows: int | None, num_classes: int = 1
):
    x_TD, routing, num_experts = make_routing(rank, case)
    x_TD.requires_grad_()
    if local:
        dispatcher = LocalDispatcher(num_experts, num_classes)
    else:
        exchange = FlatExchange(dist.group.WORLD)
        dispatcher = ExpertParallelDispatcher(num_experts, exchange, num_classes=num_classes)
    return passed(dispatcher, x_TD, routing, rank, padded_rows)[1]


def passed(dispatcher, x_TD, routing, rank, padded_rows=None):
    """Tokens there and back through experts that change nothing, and a gradient the same way."""
    plan = dispatcher.plan(routing.topk_ids_TK, padded_rows)
    rows_RD, counts_L = dispatcher.dispatch(x_TD, plan)
    y_TD = dispatcher.combine(rows_RD, routing.topk_weights_TK, plan)
    gradient_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(rank))
    y_TD.backward(gradient_TD)
    return plan, {
        "x": x_TD.detach(),
        "y": y_TD.detach(),
        "dx": x_TD.grad,
        "dy": gradient_TD,
        "rows": rows_RD.detach(),
        "counts": counts_L,
        "classes": plan.rows_per_class_list,
        "slots": plan.slots_per_expert_E,
        "ids": routing.topk_ids_TK,
        "served": (routing.topk_ids_TK >= 0).any(1),
    }


def assert_identity(result) -> None:
    served = result["served"][:, None]
    torch.testing.assert_close(result["y"], result["x"] * served)
    torch.testing.assert_close(result["dx"], result["dy"] * served)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_dispatch_then_combine_is_the_identity_over_ranks(case, size):
    results = run_ranks(_there_and_back, size, case, False, None)
    num_local = CASES[case][1] // size
    for rank, result in enumerate(results):
        assert_identity(result)
        # Every row reached the rank and the expert it was meant for, in order of source rank.
        expected = [
            result_of_source["x"][t]
            for expert in range(rank * num_local, (rank + 1) * num_local)
            for result_of_source in results
            for t, ids in enumerate(result_of_source["ids"].tolist())
            for i in ids
            if i == expert
        ]
        assert int(result["counts"].sum()) == len(expected)
        if expected:
            assert torch.equal(result["rows"], torch.stack(expected))


def experts_of_rank(rank: int, size: int, num_experts: int, num_classes: int) -> list[int]:
    """An equal run of each class."""
    share, per_class = num_experts // (num_classes * size), num_experts // num_classes
    starts = [c * per_class + rank * share for c in range(num_classes)]
    return [start + i for start in starts for i in range(share)]


@pytest.mark.parametrize("padded_rows", [None, 9])
@pytest.mark.parametrize(
    "case", [case for case, (_, experts, _, _) in CASES.items() if experts == 8]
)
def test_each_rank_has_an_equal_share_of_each_class(case, padded_rows):
    results = run_ranks(_there_and_back, 2, case, False, padded_rows, 2)
    for rank, result in enumerate(results):
        assert_identity(result)
        slots = [result["ids"].flatten().tolist().count(expert) for expert in range(8)]
        assert result["slots"].tolist() == slots
        own = experts_of_rank(rank, 2, 8, 2)
        counts = [
            sum(s["slots"][e].item() if padded_rows is None else padded_rows for s in results)
            for e in own
        ]
        assert result["counts"].tolist() == counts
        assert result["classes"] == [sum(counts[:2]), sum(counts[2:])]
        assert sum(result["classes"]) == len(result["rows"])
        at = 0
        for expert, count in zip(own, counts, strict=True):
            rows, at = result["rows"][at : at + count], at + count
            expected = [
                source["x"][t]
                for source in results
                for t, ids in enumerate(source["ids"].tolist())
                if expert in ids
            ]
            if expected:
                assert torch.equal(rows[rows.any(1)], torch.stack(expected))


@pytest.mark.parametrize("padded_rows", [None, 9])
@pytest.mark.parametrize("case", ["slots without an expert", "random"])
def test_rows_of_each_class_are_known_on_one_rank(case, padded_rows):
    result = _there_and_back(1, 1, case, True, padded_rows, 4)
    assert_identity(result)
    assert result["classes"] == result["counts"].view(4, 2).sum(1).tolist()
    assert len(result["rows"]) == sum(result["classes"])


@pytest.mark.parametrize("case", CASES)
def test_dispatch_then_combine_is_the_identity_on_one_rank(case):
    result = _there_and_back(1, 1, case, True, None)
    assert_identity(result)
    rows = [
        result["x"][t]
        for expert in range(CASES[case][1])
        for t, ids in enumerate(result["ids"].tolist())
        for i in ids
        if i == expert
    ]
    assert int(result["counts"].sum()) == len(rows)
    if rows:
        assert torch.equal(result["rows"][: len(rows)], torch.stack(rows))


@pytest.mark.parametrize("local", [True, False])
def test_padded_rows_are_fixed_in_number_and_zero_where_empty(local):
    totals = []
    for result in run_ranks(_there_and_back, 2, "random", local, 9):
        assert_identity(result)
        assert result["counts"].tolist() == ([9] * 8 if local else [18] * 4)
        assert result["rows"].shape[0] == 72
        # 18 slots on each of 2 ranks; without an exchange each rank keeps its own.
        real = int((result["rows"] != 0).any(1).sum())
        totals.append(real)
    assert totals == [18, 18] if local else sum(totals) == 36


def test_experts_that_do_not_divide_the_group_are_refused():
    message = run_ranks(_indivisible, 2)[0]
    assert "moe.num_experts=7 must be a multiple of parallel.ep=2" in message


def _indivisible(rank: int, size: int) -> str:
    with pytest.raises(ValueError) as error:
        ExpertParallelDispatcher(7, FlatExchange(dist.group.WORLD))
    return str(error.value)
