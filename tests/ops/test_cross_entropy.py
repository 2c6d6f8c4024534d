"""The compiled cross-entropy, and torch's where that runs, beside the reference in fp64."""

import pytest
import torch

from moesys.ops import library, reference
from moesys.ops.cross_entropy import cross_entropy_sum
from tests.ops.gradients import compare

pytestmark = pytest.mark.skipif(
    not library.runs_on(torch.empty(0)), reason="without compiled ops it is torch's"
)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (65, 1000), (0, 5), (2, 40_003)], ids=str)
@pytest.mark.parametrize("spread", [0.1, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients(shape: tuple[int, int], spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = spread * torch.randn(shape, generator=generator)
    targets_T = torch.randint(0, shape[1], shape[:1], generator=generator)
    targets_T[1::4] = -100
    leaves = [logits_TV.to(dtype)]
    compare(cross_entropy_sum, reference.cross_entropy_sum, leaves, targets_T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [[2, -100, 4], [-100, -100, -100]], ids=str)
def test_ignored_targets_have_no_loss_and_no_gradient(targets: list[int]) -> None:
    logits_TV = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy_sum(logits_TV, torch.tensor(targets))
    loss.backward()
    assert logits_TV.grad is not None
    assert logits_TV.grad.any(dim=1).tolist() == [target != -100 for target in targets]
    assert (loss.item() != 0) == logits_TV.grad.any().item()


def test_large_logits_neither_overflow_nor_hide_nan() -> None:
    logits_TV = torch.tensor([[1e30, 0.0, -1e30], [-1e4, 0.0, 1e4]])
    assert cross_entropy_sum(logits_TV, torch.tensor([0, 2])).item() == 0
    logits_TV[1, 1] = torch.nan
    assert cross_entropy_sum(logits_TV, torch.tensor([0, 2])).isnan()


@pytest.mark.parametrize("target", [5, -1])
def test_a_target_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(
        RuntimeError, match=f"target {target} of token 1 is not -100 and not in 0..4"
    ):
        cross_entropy_sum(torch.zeros(2, 5), torch.tensor([0, target]))


@pytest.mark.parametrize("targets", [[0, 8, -100, 3], []], ids=str)
def test_opcheck(targets: list[int]) -> None:
    logits_TV = torch.randn(len(targets), 9)
    targets_T = torch.tensor(targets, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.moesys.cross_entropy_backward,
        (torch.tensor(2.0), logits_TV, targets_T, logits_TV.logsumexp(1)),
    )
    torch.library.opcheck(
        torch.ops.moesys.cross_entropy, (logits_TV.clone().requires_grad_(), targets_T)
    )
