import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.ops import expert_order, library, reference, tokens_per_expert
from tests.ops.cases import TESTED, Case, inputs


def test_an_example_by_hand(device: str) -> None:
    ids_TK = torch.tensor([[2, 0], [0, -1], [2, 1]], device=device)
    row_of_slot_TK, slot_of_row_N, counts_E = expert_order(ids_TK, 4)
    assert row_of_slot_TK.tolist() == [[3, 0], [1, -1], [4, 2]]
    assert slot_of_row_N.tolist() == [1, 2, 5, 0, 4, -1]
    assert counts_E.tolist() == [2, 1, 2, 0]
    assert tokens_per_expert(ids_TK, 4).tolist() == [2, 1, 2, 0]


@pytest.mark.parametrize("case", TESTED, ids=str)
@pytest.mark.parametrize("id_type", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_equals_reference(case: Case, id_type: torch.dtype, device: str) -> None:
    ids_TK = inputs(case, device).topk_ids_TK.to(id_type)
    for op in ("tokens_per_expert", "expert_order"):
        compiled = getattr(torch.ops.moesys, op)(ids_TK, case.num_experts)
        expected = getattr(reference, op)(ids_TK, case.num_experts)
        torch.testing.assert_close(compiled, expected, rtol=0, atol=0)


def test_non_contiguous_ids(device: str) -> None:
    ids_TK = torch.arange(12, device=device).view(3, 4).t() % 5
    torch.testing.assert_close(expert_order(ids_TK, 5), expert_order(ids_TK.contiguous(), 5))


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda top_k: st.lists(
            st.lists(st.integers(-1, 6), min_size=top_k, max_size=top_k), min_size=1, max_size=50
        )
    )
)
def test_rows_are_sorted_and_stable(rows: list[list[int]]) -> None:
    ids_TK = torch.tensor(rows)
    row_of_slot_TK, slot_of_row_N, counts_E = expert_order(ids_TK, 7)
    ids = ids_TK.flatten().tolist()
    expected = sorted((e, s) for s, e in enumerate(ids) if e >= 0)
    assert slot_of_row_N.tolist() == [s for _, s in expected] + [-1] * ids.count(-1)
    assert counts_E.tolist() == [ids.count(e) for e in range(7)]
    for slot, row in enumerate(row_of_slot_TK.flatten().tolist()):
        assert row == -1 if ids[slot] < 0 else slot_of_row_N[row] == slot


@pytest.mark.parametrize("op", [tokens_per_expert, expert_order])
@pytest.mark.parametrize("bad", [4, -2])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
def test_an_id_out_of_range_is_an_error_on_the_cpu(op, bad, compiled, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(library, "_DEVICES", frozenset())
    with pytest.raises(
        RuntimeError, match=rf"expert id {bad} of slot 2 is not -1 and not in 0\.\.3"
    ):
        op(torch.tensor([[0, 3], [bad, 1]]), 4)


@pytest.mark.parametrize("op", [tokens_per_expert, expert_order])
def test_wrong_arguments(op) -> None:
    with pytest.raises(
        ValueError, match=r"topk_ids must be int64 or int32 \[T, K\], got .*float32"
    ):
        op(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match=r"got torch.int64 \[3\]"):
        op(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        op(torch.zeros(2, 2, dtype=torch.int64), 0)


def test_opcheck(device: str) -> None:
    ids_TK = inputs(TESTED[1], device).topk_ids_TK
    torch.library.opcheck(torch.ops.moesys.tokens_per_expert, (ids_TK, 8))
    torch.library.opcheck(torch.ops.moesys.expert_order, (ids_TK, 8))
