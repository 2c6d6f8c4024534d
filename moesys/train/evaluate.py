"""Held-out loss: nats per token, and bits per byte of the text those tokens stand for.

Shapes: V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.data.loader import EvalBatches
from moesys.ops.cross_entropy import IGNORED_TARGET
from moesys.parallel.mesh import Meshes
from moesys.parallelize.build import ParallelModel
from moesys.parallelize.context import local_slice
from moesys.parallelize.data import free_gathered
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
    parallel: ParallelModel,
    batches: EvalBatches,
    token_bytes_V: Tensor,
    dtype: str,
    meshes: Meshes,
    must_leave: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """Collective: every rank runs as many forwards. Leaves the model in eval mode, and nothing gathered.

    None if it was given up: `must_leave` is asked before each batch, and says the same on all ranks.

    bits per byte = sum of nats / ln 2 / UTF-8 bytes of the target tokens (`token_bytes_V`, int64). Ranks of tp have the
    same tokens, and only those of the last pipeline stage see the loss.
    """
    parallel.whole.eval()
    device = token_bytes_V.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    is_whole = True
    for batch in batches:
        if must_leave():
            is_whole = False
            break
        input_ids_BS = local_slice(batch.input_ids_BS, meshes).to(device)
        target_ids_BS = local_slice(batch.target_ids_BS, meshes).to(device)
        with autocast(device, dtype):
            output = _forward(parallel, input_ids_BS, batch.document_ids_BS)
        if output is not None:
            last = parallel.parts[-1]
            loss_sum = last.cross_entropy_sum(output[0], target_ids_BS.flatten())
            targets = target_ids_BS[target_ids_BS != IGNORED_TARGET]
            tokens, nbytes = sums.new_tensor(targets.numel()), token_bytes_V[targets].sum()
            sums += torch.stack([loss_sum.double(), tokens, nbytes.double()])
    for part in parallel.parts:
        free_gathered(part)
    if not is_whole:
        return None
    dist.all_reduce(sums)
    nats, tokens, nbytes = (sums / meshes.dims.tp).tolist()
    return EvalResult(
        loss=nats / tokens, bits_per_byte=nats / math.log(2) / nbytes, tokens=round(tokens)
    )


def _forward(
    parallel: ParallelModel, input_ids_BS: Tensor, documents: Tensor | None
) -> tuple[Tensor, ...] | None:
    """What the last stage returns, where it is on this rank."""
    if parallel.pipeline is not None:
        return parallel.pipeline.forward(input_ids_BS, documents)
    return parallel.whole(input_ids_BS, documents=documents)
