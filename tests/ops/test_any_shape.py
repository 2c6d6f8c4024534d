"""The ops on shapes that nobody chose."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.ops import expert_order, reference, swiglu
from tests.ops.cases import Case
from tests.ops.gradients import compare
from tests.ops.test_chunks import check_add, check_pack, chunks
from tests.ops.test_permute import compare_both
from tests.ops.test_swiglu import TYPES


@settings(max_examples=100)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda top_k: st.lists(
            st.lists(st.integers(-1, 6), min_size=top_k, max_size=top_k), min_size=1, max_size=50
        )
    )
)
def test_expert_order_is_sorted_and_stable(rows: list[list[int]]) -> None:
    ids_TK = torch.tensor(rows)
    row_of_slot_TK, slot_of_row_N, counts_E = expert_order(ids_TK, 7)
    ids = ids_TK.flatten().tolist()
    expected = sorted((e, s) for s, e in enumerate(ids) if e >= 0)
    assert slot_of_row_N.tolist() == [s for _, s in expected] + [-1] * ids.count(-1)
    assert counts_E.tolist() == [ids.count(e) for e in range(7)]
    for slot, row in enumerate(row_of_slot_TK.flatten().tolist()):
        assert row == -1 if ids[slot] < 0 else slot_of_row_N[row] == slot


@settings(max_examples=60)
@given(data=st.data())
def test_permute_and_unpermute(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9))
    case = Case(
        num_tokens=data.draw(st.integers(0, 40)),
        top_k=data.draw(st.integers(1, num_experts)),
        d_model=data.draw(st.integers(1, 300)),
        num_experts=num_experts,
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        dropped=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    compare_both(case, data.draw(st.sampled_from(["trimmed", "tail", "gaps"])), "cpu", seed=7)


@settings(max_examples=50)
@given(num_rows=st.integers(0, 40), width=st.integers(0, 200), dtype=st.sampled_from(TYPES))
def test_swiglu(num_rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up_N2F = torch.randn(num_rows, 2 * width, generator=torch.Generator().manual_seed(1))
    compare(swiglu, reference.swiglu, [gate_up_N2F.to(dtype)])


@settings(max_examples=100)
@given(data=st.data())
def test_chunks(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9000), min_size=1, max_size=12))
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=20))
    source, target = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from(TYPES))
    skip = data.draw(st.integers(0, 9))
    check_pack(chunks(lengths, source, skip=skip), torch.empty(0, dtype=target))
    parts = chunks([lengths[i] for i in order], source, skip=skip)
    check_add(parts, chunks(lengths, target, seed=1), order)
