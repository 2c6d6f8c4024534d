"""Held-out loss: nats per token, and bits per byte of the text those tokens stand for.

Shapes: V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.data.loader import EvalBatches
from moesys.models.transformer import Transformer
from moesys.ops.cross_entropy import IGNORED_TARGET
from moesys.train.step import autocast


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Over all ranks; each held-out target counted once."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: EvalBatches,
    token_bytes_V: Tensor,
    dtype: str,
    group: dist.ProcessGroup,
) -> EvalResult:
    """Collective: every rank runs as many forwards. Leaves the model in eval mode. `group` sees all tokens once.

    bits per byte = sum of nats / ln 2 / UTF-8 bytes of the target tokens (`token_bytes_V`, int64).
    """
    model.eval()
    device = token_bytes_V.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for batch in batches:
        target_ids_BS = batch.target_ids_BS.to(device)
        with autocast(device, dtype):
            loss_sum, _ = model.loss_sum(batch.input_ids_BS.to(device), target_ids_BS)
        targets = target_ids_BS[target_ids_BS != IGNORED_TARGET]
        nbytes = token_bytes_V[targets].sum()
        sums += torch.stack([loss_sum.double(), sums.new_tensor(targets.numel()), nbytes.double()])
    dist.all_reduce(sums, group=group)
    nats, tokens, nbytes = sums.tolist()
    return EvalResult(
        loss=nats / tokens, bits_per_byte=nats / math.log(2) / nbytes, tokens=int(tokens)
    )
