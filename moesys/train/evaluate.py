"""Held-out loss, nats per token and bits per byte of the text those tokens stand for, and which experts that text visits.

Shapes: V vocabulary, N sources, M MoE layers, E experts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.data.eval_sequences import EvalSequences
from moesys.data.loader import EvalBatches, MicroBatch
from moesys.data.step_batch import RankBatch
from moesys.moe.fidelity import Fidelity
from moesys.moe.similarity import layer_similarity
from moesys.moe.trials import Trials
from moesys.moe.visits import VisitCounter
from moesys.ops.cross_entropy import IGNORED_TARGET
from moesys.parallel.mesh import Meshes
from moesys.parallelize.build import ParallelModel
from moesys.parallelize.context import local_slice
from moesys.parallelize.data import free_gathered
from moesys.plan.codec_choice import Trial
from moesys.train.step import autocast

NOTHING = nullcontext()


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Over all ranks; each held-out target counted once."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Of one source, over all ranks."""

    nats: float
    tokens: float
    bytes: float

    def result(self) -> EvalResult:
        return mixed([self], [1.0])


def mixed(sums_N: Sequence[_Sums], weights_N: Sequence[float]) -> EvalResult:
    """Of text that takes this share of its tokens from each source, however many of them were counted. Pure."""
    total = math.fsum(weights_N)
    shares_N = [weight / total for weight in weights_N]
    nats = math.fsum(w * s.nats / s.tokens for w, s in zip(shares_N, sums_N, strict=True))
    nbytes = math.fsum(w * s.bytes / s.tokens for w, s in zip(shares_N, sums_N, strict=True))
    return EvalResult(
        loss=nats,
        bits_per_byte=nats / math.log(2) / nbytes,
        tokens=round(math.fsum(s.tokens for s in sums_N)),
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of all sources."""

    whole: EvalResult
    """Of text mixed by the weights of the configuration, so that it means the same throughout a run."""
    by_source: dict[str, EvalResult]
    load_by_source: dict[str, list[list[int]]]
    """Slots that routers gave each expert of each MoE layer, M x E, as `measure_loads` counts them."""
    codec_error_M: list[float]
    """How far an MoE layer's output with codec and wire is from that without, relative; [] where neither is used. Of the
    first batch alone."""
    expert_similarity_M: list[float]
    """Mean cosine between the weights of two experts of a layer: 0 = unrelated, 1 = copies."""


@torch.no_grad()
def evaluate(
    parallel: ParallelModel,
    batches: Mapping[str, EvalBatches | EvalSequences],
    weights_N: Sequence[float],
    token_bytes_V: Tensor,
    dtype: str,
    meshes: Meshes,
    must_leave: Callable[[], bool] = lambda: False,
    compresses: bool = False,
) -> Evaluation | None:
    """Collective: every rank runs as many forwards. Leaves the model in eval mode, and nothing gathered.

    `batches` of each source by name, and their weights. None if it was given up: `must_leave` is asked before each
    batch, and says the same on all ranks. `compresses`: whether training uses a codec or a wire, whose error is measured.

    bits per byte = sum of nats / ln 2 / UTF-8 bytes of the target tokens (`token_bytes_V`, int64). Ranks of tp have the
    same tokens, and only those of the last pipeline stage see the loss.
    """
    device = token_bytes_V.device
    sums_N3 = torch.zeros(
        len(batches), 3, dtype=torch.float64, device=device
    )  # nats, tokens, bytes
    loads = _Loads(parallel, len(batches), device)
    num_layers = len(parallel.whole.config.decoder_moe_layers)
    fidelity = Fidelity(parallel.whole.moe_places(), num_layers, device)
    during_first = fidelity if compresses else NOTHING
    done = 0
    for index, output, target_ids_BS in _forwards(
        parallel, batches, loads, dtype, meshes, must_leave, during_first
    ):
        done += 1
        if output is not None:
            last = parallel.parts[-1]
            loss_sum = last.cross_entropy_sum(output[0], target_ids_BS.flatten())
            targets = target_ids_BS[target_ids_BS != IGNORED_TARGET]
            tokens, nbytes = sums_N3.new_tensor(targets.numel()), token_bytes_V[targets].sum()
            sums_N3[index] += torch.stack([loss_sum.double(), tokens, nbytes.double()])
    if done < sum(map(len, batches.values())):
        return None
    dist.all_reduce(sums_N3)
    sums_N = [
        _Sums(nats=nats, tokens=tokens, bytes=nbytes)
        for nats, tokens, nbytes in (sums_N3 / meshes.dims.tp).tolist()
    ]
    return Evaluation(
        whole=mixed(sums_N, weights_N),
        by_source={name: sums.result() for name, sums in zip(batches, sums_N, strict=True)},
        load_by_source=dict(zip(batches, loads.of_all_ranks(), strict=True)),
        codec_error_M=fidelity.of_all_ranks() if compresses else [],
        expert_similarity_M=_similarities(parallel, meshes, device),
    )


@torch.no_grad()
def measure_loads(
    parallel: ParallelModel,
    batches: Mapping[str, EvalBatches | EvalSequences],
    dtype: str,
    meshes: Meshes,
) -> dict[str, list[list[int]]]:
    """Collective. Of each source, slots that the routers of each MoE layer give each expert: M x E, over all ranks.

    Counted before anything is dropped, of tokens that have a target alone, and beside what a step counts; leaves the model
    in eval mode and nothing gathered, and changes nothing else.
    """
    loads = _Loads(parallel, len(batches), next(parallel.whole.parameters()).device)
    for _ in _forwards(parallel, batches, loads, dtype, meshes, lambda: False):
        pass
    return dict(zip(batches, loads.of_all_ranks(), strict=True))


@torch.no_grad()
def try_candidates(
    parallel: ParallelModel,
    batches: EvalBatches | EvalSequences,
    num_candidates: int,
    dtype: str,
    meshes: Meshes,
    forwards: int,
) -> list[list[Trial]]:
    """Collective. What each of `dispatch.candidates` does in each MoE layer, the first being none, on the first of `batches`.

    `forwards` of each layer in a training step. The same on all ranks; layers for multi-token prediction alone, which no evaluation runs, are left out. Leaves the model in
    eval mode and nothing gathered, and changes nothing else.
    """
    device = next(parallel.whole.parameters()).device
    num_layers = len(parallel.whole.config.decoder_moe_layers)
    trials = Trials(parallel.whole.moe_places(), num_layers, num_candidates, forwards)
    parallel.whole.eval()
    batch = next(iter(batches))
    fed, _ = _fed(batch, meshes, device)
    with autocast(device, dtype), trials:
        _forward(parallel, fed)
    for part in parallel.parts:
        free_gathered(part)
    return trials.of_all_ranks(device)


class _Loads:
    """Slots of each source, of each MoE layer of the decoder (no others run here), and expert."""

    def __init__(self, parallel: ParallelModel, num_sources: int, device: torch.device) -> None:
        config = parallel.whole.config
        layers = config.decoder_moe_layers
        self.choices_M = [config.moe_of(layer).num_choices for layer in layers]
        shape = (num_sources, len(self.choices_M), config.moe.num_choices)
        self.counts_NME = torch.zeros(shape, dtype=torch.int64, device=device)
        places = parallel.whole.moe_places()
        self.counter = VisitCounter({at: places[at] for at in places if at < len(layers)})

    def of_all_ranks(self) -> list[list[list[int]]]:
        """Collective: each rank has counted its own tokens in its own stages."""
        dist.all_reduce(self.counts_NME)
        return [
            [row[:number] for row, number in zip(counts_ME, self.choices_M, strict=True)]
            for counts_ME in self.counts_NME.tolist()
        ]


def _forwards(
    parallel: ParallelModel,
    batches: Mapping[str, EvalBatches | EvalSequences],
    loads: _Loads,
    dtype: str,
    meshes: Meshes,
    must_leave: Callable[[], bool],
    during_first: AbstractContextManager[object] = NOTHING,
) -> Iterator[tuple[int, tuple[Tensor, ...] | None, Tensor]]:
    """Collective. All batches of all sources: the source's number, what the last stage returns, this rank's targets.

    Ends early where `must_leave` says so. The forward of the first batch runs within `during_first`.
    """
    device = loads.counts_NME.device
    parallel.whole.eval()
    with loads.counter:
        for index, batch in _every(batches):
            if must_leave():
                break
            fed, target_ids_BS = _fed(batch, meshes, device)
            loads.counter.count_into(loads.counts_NME[index], target_ids_BS != IGNORED_TARGET)
            with autocast(device, dtype), during_first:
                output = _forward(parallel, fed)
            during_first = NOTHING
            yield index, output, target_ids_BS
    for part in parallel.parts:
        free_gathered(part)


def _every(
    batches: Mapping[str, EvalBatches | EvalSequences],
) -> Iterator[tuple[int, MicroBatch | RankBatch]]:
    for index, of_source in enumerate(batches.values()):
        for batch in of_source:
            yield index, batch


def _fed(
    batch: MicroBatch | RankBatch, meshes: Meshes, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """What a forward is told, and the targets of this rank's positions."""
    if isinstance(batch, RankBatch):
        ids_BS, targets_BS = batch.input_ids_BS, batch.targets_BSN[..., 0]
        known = {"pieces": batch.pieces}
    else:
        ids_BS = local_slice(batch.input_ids_BS, meshes)
        targets_BS = local_slice(batch.target_ids_BS, meshes)
        known = {"documents": batch.document_ids_BS}
    return {"ids_BS": ids_BS.to(device), **known}, targets_BS.to(device)


def _similarities(parallel: ParallelModel, meshes: Meshes, device: torch.device) -> list[float]:
    """Collective: ranks of a stage share out its experts, and all learn of all stages."""
    model = parallel.whole
    similarity_M = torch.zeros(len(model.config.moe_layers), dtype=torch.float64, device=device)
    for at, layer in model.moe_places().items():
        similarity_M[at] = layer_similarity(layer.experts)
    if meshes.dims.pp > 1:
        dist.all_reduce(similarity_M, group=meshes.pp_group)
    return similarity_M.tolist()


def _forward(parallel: ParallelModel, fed: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """What the last stage returns, where it is on this rank."""
    if parallel.pipeline is not None:
        return parallel.pipeline.forward(fed)
    return parallel.whole(fed["ids_BS"], **fed)
