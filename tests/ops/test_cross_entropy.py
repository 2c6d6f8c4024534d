"""The compiled cross-entropy beside torch's."""

import pytest
import torch
import torch.nn.functional as F

from moesys.ops import library
from moesys.ops.cross_entropy import cross_entropy_sum

pytestmark = pytest.mark.skipif(
    not library.runs_on(torch.empty(0)), reason="without compiled ops it is torch's"
)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (65, 1000), (0, 5), (2, 40_003)], ids=str)
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_values_and_gradients_are_torchs(shape: tuple[int, int], spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TV = spread * torch.randn(shape, generator=generator)
    targets_T = torch.randint(0, shape[1], shape[:1], generator=generator)
    targets_T[::4] = -100
    got = logits_TV.clone().requires_grad_()
    exact = logits_TV.double().requires_grad_()
    loss = cross_entropy_sum(got, targets_T)
    truth = F.cross_entropy(exact, targets_T, reduction="sum")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    (loss * 0.3).backward()
    (truth * 0.3).backward()
    assert got.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    assert not got.grad[::4].any(), "ignored targets have no gradient"


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


def test_opcheck() -> None:
    logits_TV = torch.randn(4, 9, requires_grad=True)
    targets_T = torch.tensor([0, 8, -100, 3])
    torch.library.opcheck(torch.ops.moesys.cross_entropy, (logits_TV, targets_T))
    lse_T = logits_TV.detach().logsumexp(1)
    torch.library.opcheck(
        torch.ops.moesys.cross_entropy_backward,
        (torch.tensor(2.0), logits_TV.detach(), targets_T, lse_T),
    )
