import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.ops import reference, unpermute
from moesys.ops.clusters import (
    ClusterOrder,
    cluster_order,
    cross_polytope,
    member_means,
    restore,
    slots_by_code,
)
from tests.ops.cases import TESTED, Case, inputs
from tests.ops.gradients import compare

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
ROUNDED_TWICE = {
    torch.bfloat16: {"rtol": 3e-2, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
}
"""The gradient of means is made of that of rows."""
KINDS = ["random", "clustered", "all equal", "all distinct"]


def codes(kind: str, num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return {
        "random": torch.randint(-5, 40, (num_tokens,), generator=generator),
        "clustered": torch.randint(0, 3, (num_tokens,), generator=generator) * 2**60,
        "all equal": torch.full((num_tokens,), 7),
        "all distinct": torch.randperm(num_tokens, generator=generator),
    }[kind]


def trimmed(order: ClusterOrder) -> ClusterOrder:
    return order.trimmed(int(order.rows_per_expert_E.sum()), int(order.num_members))


def order_of(case: Case, kind: str, device: str) -> ClusterOrder:
    ids_TK = inputs(case, device).topk_ids_TK
    codes_TK = codes(kind, case.num_tokens).to(device)[:, None].expand(ids_TK.shape)
    return trimmed(cluster_order(ids_TK, codes_TK, case.num_experts))


def obvious_order(ids_TK: Tensor, codes_TK: Tensor) -> dict[tuple[int, int], list]:
    """Slots by (expert, code): experts rising, then first slots."""
    members: dict[tuple[int, int], list] = {}
    for token, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            if expert >= 0:
                key = (expert, int(codes_TK[token, k]))
                members.setdefault(key, []).append(token * len(ids) + k)
    return dict(sorted(members.items(), key=lambda item: (item[0][0], item[1][0])))


def assert_same_rows(
    order: ClusterOrder, expected: dict[tuple[int, int], list], num_experts: int
) -> None:
    """Of each expert the same rows, in whatever order."""
    bounds, members = order.first_member_X.tolist(), order.member_slots_M.tolist()
    rows = [set(members[a:b]) for a, b in itertools.pairwise(bounds)]
    row_of_slot_N = order.row_of_slot_TK.flatten().tolist()
    assert [
        {slot for slot, row in enumerate(row_of_slot_N) if row == r} for r in range(len(rows))
    ] == rows
    per_expert = iter(rows)
    for expert, count in enumerate(order.rows_per_expert_E.tolist()):
        found = {frozenset(row) for row in itertools.islice(per_expert, count)}
        assert found == {frozenset(slots) for (e, _), slots in expected.items() if e == expert}
    assert len(order.rows_per_expert_E) == num_experts


@settings(max_examples=50)
@given(data=st.data())
def test_slots_of_one_expert_and_code_share_a_row(data: st.DataObject) -> None:
    num_tokens, top_k = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(1, 5))
    ids = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    ids_TK = torch.tensor(
        data.draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens)), dtype=torch.int64
    ).view(num_tokens, top_k)
    few = st.integers(-2, 2) | st.integers(-(2**62), 2**62)
    num_slots = num_tokens * top_k
    codes_TK = torch.tensor(
        data.draw(st.lists(few, min_size=num_slots, max_size=num_slots)), dtype=torch.int64
    ).view(num_tokens, top_k)
    order = trimmed(cluster_order(ids_TK, codes_TK, num_experts))
    expected = obvious_order(ids_TK, codes_TK)
    assert order.member_slots_M.tolist() == [slot for slots in expected.values() for slot in slots]
    ends = torch.tensor([0, *(len(slots) for slots in expected.values())]).cumsum(0)
    assert order.first_member_X.tolist() == ends.tolist()
    assert order.rows_per_expert_E.tolist() == [
        sum(expert == e for expert, _ in expected) for e in range(num_experts)
    ]
    row_of_slot = {slot: row for row, slots in enumerate(expected.values()) for slot in slots}
    found = order.row_of_slot_TK.flatten().tolist()
    assert found == [row_of_slot.get(slot, -1) for slot in range(num_tokens * top_k)]
    by_code = slots_by_code(ids_TK, codes_TK, num_experts)
    for base in (1, 3):
        is_first_N = by_code.is_new(by_code.codes_N // base)
        order = trimmed(by_code.in_order_of_code(is_first_N))
        assert_same_rows(order, obvious_order(ids_TK, codes_TK // base), num_experts)


@each_device
@pytest.mark.parametrize("case", TESTED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(case: Case, kind: str, device: str) -> None:
    order = order_of(case, kind, device)
    data = inputs(case, device)
    arguments = (order.row_of_slot_TK, order.member_slots_M, order.first_member_X)
    compare(
        lambda x: member_means(x, order),
        lambda x: reference.member_means(x, *arguments),
        [data.x_TD],
    )
    num_rows = order.first_member_X.numel() - 1
    generator = torch.Generator().manual_seed(2)
    rows_CD, means_CD = (
        torch.randn(num_rows, case.d_model, generator=generator).to(data.x_TD) for _ in range(2)
    )
    slopes_C = torch.rand(num_rows, generator=generator).to(data.weights_TK)
    compare(
        lambda rows, means, x, w: restore(rows, means, x, w, slopes_C.to(w), order),
        lambda rows, means, x, w: reference.restore(
            rows, means, x, w, slopes_C.to(w), order.row_of_slot_TK
        ),
        [rows_CD, means_CD, data.x_TD, data.weights_TK],
        **ROUNDED_TWICE.get(case.dtype, {}),
    )


def test_gradients_by_finite_differences() -> None:
    case = Case(num_tokens=7, top_k=2, d_model=3, num_experts=2, dtype=torch.float64, dropped=0.2)
    order, data = order_of(case, "clustered", "cpu"), inputs(case)
    num_rows = order.first_member_X.numel() - 1
    rows_CD, means_CD = (torch.randn(num_rows, 3, dtype=torch.float64) for _ in range(2))
    slopes_C = torch.rand(num_rows, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (rows_CD, means_CD, data.x_TD, data.weights_TK)]
    assert torch.autograd.gradcheck(lambda x: member_means(x, order), leaves[2])
    assert torch.autograd.gradcheck(lambda *args: restore(*args, slopes_C, order), tuple(leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_alone_in_its_row_is_exact(dtype: torch.dtype) -> None:
    """Its mean is the token, its output the experts', bit for bit, whatever the slope."""
    case = Case(num_tokens=90, top_k=3, d_model=130, num_experts=5, dtype=dtype, dropped=0.1)
    order, data = order_of(case, "all distinct", "cpu"), inputs(case)
    means_CD = member_means(data.x_TD, order)
    assert torch.equal(means_CD, data.x_TD[order.member_slots_M // 3])
    rows_CD = torch.randn(means_CD.shape).to(dtype)
    plain_TD = unpermute(rows_CD, data.weights_TK, order.row_of_slot_TK)
    for slope in (0.0, 1.0, 0.37):
        slopes_C = torch.full(rows_CD.shape[:1], slope)
        y_TD = restore(rows_CD, means_CD, data.x_TD, data.weights_TK, slopes_C, order)
        assert torch.equal(y_TD, plain_TD)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes(dtype: torch.dtype, device: str) -> None:
    turned_THV = torch.randn(40, 3, 17, generator=torch.Generator().manual_seed(3))
    turned_THV = turned_THV.to(device, dtype)
    turned_THV[0] = 0
    turned_THV[1] = -2
    turned_THV[2, :, 3:] = turned_THV[2, :, :1].abs() * 9  # equals
    codes_TH = cross_polytope(turned_THV)
    assert codes_TH.dtype == torch.int64
    assert torch.equal(codes_TH, reference.cross_polytope(turned_THV))
    assert codes_TH[:3].tolist() == [[0] * 3, [1] * 3, [6] * 3]
    scaled_TH = cross_polytope(turned_THV * 4)
    assert torch.equal(scaled_TH, codes_TH)
    opposite_TH = cross_polytope(-turned_THV[1:])
    assert torch.equal(opposite_TH, codes_TH[1:] ^ 1)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_row_that_is_not_finite_is_named(value: str) -> None:
    turned_THV = torch.zeros(9, 2, 4)
    turned_THV[5, 1, 3] = float(value)
    for op in (cross_polytope, reference.cross_polytope):
        with pytest.raises(RuntimeError, match="cross_polytope: row 5 is not finite"):
            op(turned_THV)


def test_wrong_arguments() -> None:
    order = order_of(Case(num_tokens=4, top_k=2, d_model=3, num_experts=2), "random", "cpu")
    num_rows = order.first_member_X.numel() - 1
    x_TD, weights_TK = torch.zeros(4, 3), torch.zeros(4, 2)
    rows_CD, slopes_C = torch.zeros(num_rows, 3), torch.zeros(num_rows)
    with pytest.raises(ValueError, match=r"x must be floating point \[T, D\] with T = 4"):
        member_means(torch.zeros(5, 3), order)
    with pytest.raises(ValueError, match="slopes must be"):
        restore(rows_CD, rows_CD, x_TD, weights_TK, slopes_C[1:], order)
    with pytest.raises(ValueError, match="means must be"):
        restore(rows_CD, rows_CD.double(), x_TD, weights_TK, slopes_C, order)
    with pytest.raises(ValueError, match="turned rows"):
        cross_polytope(torch.zeros(3, 4))
    for wrong in (
        order._replace(member_slots_M=order.member_slots_M + 99),
        order._replace(first_member_X=order.first_member_X.flip(0)),
    ):
        with pytest.raises(RuntimeError, match="member_means"):
            member_means(x_TD, wrong)
    beyond = order._replace(row_of_slot_TK=order.row_of_slot_TK + num_rows)
    with pytest.raises(RuntimeError, match="row_of_slot"):
        restore(rows_CD, rows_CD, x_TD, weights_TK, slopes_C, beyond)


def test_ops_as_torch_wants_them() -> None:
    case = Case(num_tokens=20, top_k=2, d_model=8, num_experts=3)
    order, data = order_of(case, "random", "cpu"), inputs(case)
    num_rows = order.first_member_X.numel() - 1
    arguments = (order.row_of_slot_TK, order.member_slots_M, order.first_member_X)
    x_TD, weights_TK = data.x_TD.requires_grad_(), data.weights_TK.requires_grad_()
    rows_CD, means_CD = (torch.randn(num_rows, 8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.moesys.cross_polytope, (torch.randn(6, 2, 4),))
    torch.library.opcheck(torch.ops.moesys.member_means, (x_TD, *arguments))
    torch.library.opcheck(
        torch.ops.moesys.restore,
        (rows_CD, means_CD, x_TD, weights_TK, torch.rand(num_rows), *arguments),
    )
