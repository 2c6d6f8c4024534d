import pytest
import torch
from torch import Tensor

from moesys.ops import expert_order, permute, reference, unpermute
from tests.ops.cases import TESTED, Case, inputs
from tests.ops.gradients import compare

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


def order_of(ids_TK: Tensor, num_experts: int, layout: str) -> tuple[Tensor, Tensor]:
    """slot_of_row_N and row_of_slot_TK: as many rows as exist, a tail of -1, or -1 before each row."""
    row_of_slot_TK, slot_of_row_N, counts_E = expert_order(ids_TK, num_experts)
    if layout == "trimmed":
        return slot_of_row_N[: int(counts_E.sum())], row_of_slot_TK
    if layout == "tail":
        return slot_of_row_N, row_of_slot_TK
    gapped_N = torch.stack([torch.full_like(slot_of_row_N, -1), slot_of_row_N], dim=1).flatten()
    return gapped_N, torch.where(row_of_slot_TK < 0, -1, 2 * row_of_slot_TK + 1)


def compare_both(case: Case, layout: str, device: str, seed: int = 0) -> None:
    data = inputs(case, device, seed)
    slot_of_row_N, row_of_slot_TK = order_of(data.topk_ids_TK, case.num_experts, layout)
    compare(permute, reference.permute, [data.x_TD], slot_of_row_N, row_of_slot_TK)
    rows_ND = torch.randn(slot_of_row_N.shape[0], case.d_model).to(data.x_TD)
    compare(unpermute, reference.unpermute, [rows_ND, data.weights_TK], row_of_slot_TK)


@each_device
@pytest.mark.parametrize("case", TESTED, ids=str)
@pytest.mark.parametrize("layout", ["trimmed", "tail", "gaps"])
def test_values_and_gradients(case: Case, layout: str, device: str) -> None:
    compare_both(case, layout, device)


@each_device
@pytest.mark.parametrize("layout", ["trimmed", "tail", "gaps"])
def test_there_and_back_is_the_identity(layout: str, device: str) -> None:
    """With weights that sum to 1, in value and in gradient."""
    data = inputs(TESTED[0], device)
    slot_of_row_N, row_of_slot_TK = order_of(data.topk_ids_TK, 8, layout)
    x_TD = data.x_TD.requires_grad_()
    weights_TK = data.weights_TK.softmax(dim=1)
    out_TD = unpermute(permute(x_TD, slot_of_row_N, row_of_slot_TK), weights_TK, row_of_slot_TK)
    grad_TD = torch.randn_like(out_TD)
    out_TD.backward(grad_TD)
    torch.testing.assert_close(out_TD, x_TD)
    torch.testing.assert_close(x_TD.grad, grad_TD)


@each_device
def test_rows_that_serve_no_slot(device: str) -> None:
    """They are zeros after permute, never read by unpermute, and their gradient is zero."""
    slot_of_row_N = torch.tensor([-1, 1, 0, -1], device=device)
    row_of_slot_TK = torch.tensor([[2, 1], [-1, -1]], device=device)
    x_TD = torch.tensor([[5.0], [7.0]], device=device)
    assert permute(x_TD, slot_of_row_N, row_of_slot_TK).flatten().tolist() == [0, 5, 5, 0]
    nan = float("nan")
    rows_ND = torch.tensor([[nan], [3.0], [4.0], [nan]], device=device, requires_grad=True)
    weights_TK = torch.tensor([[0.5, 2.0], [1.0, 1.0]], device=device, requires_grad=True)
    out_TD = unpermute(rows_ND, weights_TK, row_of_slot_TK)
    out_TD.sum().backward()  # an expanded gradient, of stride 0
    assert out_TD.flatten().tolist() == [8, 0]
    assert rows_ND.grad is not None
    assert weights_TK.grad is not None
    assert rows_ND.grad.flatten().tolist() == [0, 2, 0.5, 0]
    assert weights_TK.grad.tolist() == [[4, 3], [0, 0]]


@each_device
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (0, 0), (3, 0)])
def test_rows_without_any_slot(num_tokens: int, top_k: int, device: str) -> None:
    """A rank without tokens, its rows padded to a fixed number."""
    slot_of_row_N = torch.full((3,), -1, device=device)
    row_of_slot_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    x_TD = torch.ones(num_tokens, 5, device=device)
    assert torch.equal(permute(x_TD, slot_of_row_N, row_of_slot_TK).cpu(), torch.zeros(3, 5))
    compare(permute, reference.permute, [x_TD], slot_of_row_N, row_of_slot_TK)
    leaves = [torch.ones(3, 5, device=device), torch.ones(num_tokens, top_k, device=device)]
    compare(unpermute, reference.unpermute, leaves, row_of_slot_TK)


@each_device
def test_one_slot_per_row_reorders_and_inverts(device: str) -> None:
    """What the receiver of an exchange does: arrivals into expert order, and back."""
    for dtype in (torch.float32, torch.int8, torch.int64):
        rows_RD = torch.arange(42, device=device).view(6, 7).to(dtype)
        ids_R1 = torch.tensor([[2], [0], [1], [0], [2], [1]], device=device)
        row_of_slot_R1, slot_of_row_R, _ = expert_order(ids_R1, 3)
        sorted_RD = permute(rows_RD, slot_of_row_R, row_of_slot_R1)
        assert torch.equal(sorted_RD, rows_RD[[1, 3, 2, 5, 0, 4]])
        assert torch.equal(
            permute(sorted_RD, row_of_slot_R1[:, 0], slot_of_row_R[:, None]), rows_RD
        )


@each_device
def test_non_contiguous_inputs(device: str) -> None:
    data = inputs(TESTED[0], device)
    slot_of_row_N, row_of_slot_TK = order_of(data.topk_ids_TK, 8, "tail")
    slots_strided_N = torch.stack([slot_of_row_N, slot_of_row_N], dim=1)[:, 0]
    rows_strided_TK = row_of_slot_TK.t().contiguous().t()
    x_strided_TD = data.x_TD.t().contiguous().t()
    weights_strided_TK = data.weights_TK.t().contiguous().t()
    rows_ND = permute(x_strided_TD, slots_strided_N, rows_strided_TK)
    assert torch.equal(rows_ND, permute(data.x_TD, slot_of_row_N, row_of_slot_TK))
    rows_strided_ND = rows_ND.t().contiguous().t()
    compare(unpermute, reference.unpermute, [rows_strided_ND, weights_strided_TK], rows_strided_TK)


def test_gradients_by_finite_differences() -> None:
    data = inputs(Case(num_tokens=5, top_k=2, d_model=3, num_experts=4, dtype=torch.float64))
    slot_of_row_N, row_of_slot_TK = order_of(data.topk_ids_TK, 4, "gaps")
    x_TD, weights_TK = data.x_TD.requires_grad_(), data.weights_TK.requires_grad_()
    rows_ND = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, slot_of_row_N, row_of_slot_TK), x_TD)
    assert torch.autograd.gradcheck(
        lambda rows, weights: unpermute(rows, weights, row_of_slot_TK), (rows_ND, weights_TK)
    )


@each_device
def test_bf16_sums_are_rounded_once(device: str) -> None:
    """256 + 1 - 256 is 0 when each partial sum is bf16, and 1 in fp32."""
    rows_ND = torch.tensor([[256.0], [1.0], [-256.0]], device=device, dtype=torch.bfloat16)
    row_of_slot_TK = torch.tensor([[0, 1, 2]], device=device)
    out_TD = unpermute(rows_ND, torch.ones(1, 3, device=device), row_of_slot_TK)
    assert out_TD.item() == 1
    x_TD = torch.zeros(1, 1, device=device, dtype=torch.bfloat16, requires_grad=True)
    permute(x_TD, torch.arange(3, device=device), row_of_slot_TK).backward(rows_ND)
    assert x_TD.grad is not None
    assert x_TD.grad.item() == 1


def test_wrong_arguments() -> None:
    x_TD, slots_N = torch.zeros(3, 4), torch.zeros(6, dtype=torch.int64)
    rows_TK, weights_TK = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"x must be \[T, D\] with T = 3 .* got \[2, 4\]"):
        permute(x_TD[:2], slots_N, rows_TK)
    with pytest.raises(ValueError, match="slot_of_row must be int64"):
        permute(x_TD, slots_N.int(), rows_TK)
    with pytest.raises(ValueError, match="row_of_slot must be int64"):
        permute(x_TD, slots_N, rows_TK.int())
    with pytest.raises(ValueError, match=r"weights must be torch.float32 .* got torch.bfloat16"):
        unpermute(torch.zeros(6, 4), weights_TK.bfloat16(), rows_TK)
    with pytest.raises(ValueError, match=r"\[3, 2\] as row_of_slot, got torch.float32 \[2, 2\]"):
        unpermute(torch.zeros(6, 4), weights_TK[:2], rows_TK)
    with pytest.raises(ValueError, match="rows must be floating point"):
        unpermute(torch.zeros(6, 4, dtype=torch.int64), weights_TK, rows_TK)


def test_an_index_out_of_range_is_an_error_on_the_cpu() -> None:
    x_TD, slots_N = torch.zeros(3, 4), torch.full((6,), 6)
    rows_TK, weights_TK = torch.full((3, 2), 6), torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="slot_of_row has an entry"):
        permute(x_TD, slots_N, rows_TK)
    with pytest.raises(RuntimeError, match="row_of_slot has an entry"):
        unpermute(torch.zeros(6, 4), weights_TK, rows_TK)
    rows_ND = torch.zeros(6, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="row_of_slot has an entry"):
        torch.ops.moesys.unpermute_backward(x_TD, rows_ND, weights_TK, rows_TK)
    with pytest.raises(RuntimeError, match="row_of_slot has an entry"):
        torch.ops.moesys.permute_backward(rows_ND, torch.full((3, 2), -2))


@each_device
def test_opcheck(device: str) -> None:
    data = inputs(TESTED[1], device)
    slot_of_row_N, row_of_slot_TK = order_of(data.topk_ids_TK, 8, "tail")
    ops, x_TD, weights_TK = torch.ops.moesys, data.x_TD, data.weights_TK
    rows_ND = permute(x_TD, slot_of_row_N, row_of_slot_TK)
    torch.library.opcheck(ops.permute_backward, (rows_ND, row_of_slot_TK))
    torch.library.opcheck(ops.unpermute_backward, (x_TD, rows_ND, weights_TK, row_of_slot_TK))
    for leaf in (x_TD, rows_ND, weights_TK):
        leaf.requires_grad_()
    torch.library.opcheck(ops.permute, (x_TD, slot_of_row_N, row_of_slot_TK))
    torch.library.opcheck(ops.unpermute, (rows_ND, weights_TK, row_of_slot_TK))
