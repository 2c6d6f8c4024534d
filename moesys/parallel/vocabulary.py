"""Embedding and cross-entropy with the vocabulary cut over the ranks of a tensor-parallel group (1909.08053, sec. 3).

Shapes: T tokens, D model, v = V / size rows of the vocabulary on this rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moesys.ops.cross_entropy import IGNORED_TARGET
from moesys.parallel.tensor import TensorParallel


class VocabularyParallel:
    """This rank has the rows first .. first + v - 1."""

    def __init__(self, vocab_size: int, tp: TensorParallel) -> None:
        self.tp = tp
        self.size = vocab_size // tp.size
        self.first = tp.rank * self.size

    def embed(self, ids_T: Tensor, table_vD: Tensor) -> Tensor:
        """Each rank looks up the ids that it has; the sum leaves the region as its tokens."""
        local_T, is_here_T = self._localize(ids_T)
        rows_TD = F.embedding(local_T, table_vD) * is_here_T[:, None]
        return self.tp.leave(rows_TD)

    def cross_entropy_sum(self, logits_Tv: Tensor, targets_T: Tensor) -> Tensor:
        """As ops.cross_entropy_sum, on every rank the same; two numbers per token travel, and no logits."""
        return _CrossEntropySum.apply(logits_Tv, targets_T, self)

    def _localize(self, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each id in this rank's part (0 if it is elsewhere), and whether it is here."""
        local_T = ids_T - self.first
        is_here_T = (local_T >= 0) & (local_T < self.size)
        return local_T.where(is_here_T, 0), is_here_T


class _CrossEntropySum(torch.autograd.Function):
    """sum_t log sum_v exp(logits_tv) - logits_t[target_t]; the gradient recomputes softmax from the logits."""

    @staticmethod
    def forward(
        ctx, logits_Tv: Tensor, targets_T: Tensor, vocabulary: VocabularyParallel
    ) -> Tensor:
        tp = vocabulary.tp
        local_T, is_here_T = vocabulary._localize(targets_T)
        lse_T = logits_Tv.logsumexp(dim=1)
        top_T = tp.max(lse_T)
        target_logit_T = logits_Tv.gather(1, local_T[:, None])[:, 0] * is_here_T
        sums_2T = tp.sum(torch.stack([(lse_T - top_T).exp(), target_logit_T]))
        lse_T = top_T + sums_2T[0].log()
        counts_T = targets_T != IGNORED_TARGET
        ctx.save_for_backward(logits_Tv, lse_T, local_T, is_here_T, counts_T)
        return ((lse_T - sums_2T[1]) * counts_T).sum(dtype=torch.float64).to(logits_Tv.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        logits_Tv, lse_T, local_T, is_here_T, counts_T = ctx.saved_tensors
        grad_Tv = (logits_Tv - lse_T[:, None]).exp_()
        grad_Tv.scatter_add_(1, local_T[:, None], -is_here_T[:, None].to(grad_Tv.dtype))
        return grad_Tv.mul_((grad * counts_T)[:, None]), None, None
