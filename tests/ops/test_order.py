import pytest
import torch

from moesys.ops import expert_order, library, reference, tokens_per_expert
from tests.ops.cases import TESTED, Case, inputs

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@each_device
def test_an_example_by_hand(device: str) -> None:
    ids_TK = torch.tensor([[2, 0], [0, -1], [2, 1]], device=device)
    row_of_slot_TK, slot_of_row_N, counts_E = expert_order(ids_TK, 4)
    assert row_of_slot_TK.tolist() == [[3, 0], [1, -1], [4, 2]]
    assert slot_of_row_N.tolist() == [1, 2, 5, 0, 4, -1]
    assert counts_E.tolist() == [2, 1, 2, 0]
    assert tokens_per_expert(ids_TK, 4).tolist() == [2, 1, 2, 0]


@each_device
@pytest.mark.parametrize("case", TESTED, ids=str)
@pytest.mark.parametrize("id_type", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_equals_reference(case: Case, id_type: torch.dtype, device: str) -> None:
    ids_TK = inputs(case, device).topk_ids_TK.to(id_type)
    for op in ("tokens_per_expert", "expert_order"):
        compiled = getattr(torch.ops.moesys, op)(ids_TK, case.num_experts)
        expected = getattr(reference, op)(ids_TK, case.num_experts)
        torch.testing.assert_close(compiled, expected, rtol=0, atol=0)


@each_device
def test_non_contiguous_ids(device: str) -> None:
    ids_TK = torch.arange(12, device=device).view(3, 4).t() % 5
    torch.testing.assert_close(expert_order(ids_TK, 5), expert_order(ids_TK.contiguous(), 5))


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


@each_device
def test_opcheck(device: str) -> None:
    ids_TK = inputs(TESTED[1], device).topk_ids_TK
    torch.library.opcheck(torch.ops.moesys.tokens_per_expert, (ids_TK, 8))
    torch.library.opcheck(torch.ops.moesys.expert_order, (ids_TK, 8))
