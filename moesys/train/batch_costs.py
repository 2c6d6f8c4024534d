"""What pieces of sequences cost on this machine, by which batches are planned: timed at the start, kept in the run's folder.

Attention is timed alone, on one piece and on many; all else by two rehearsals of a micro-step, of which attention is taken off; what
rings pass on by a round without work.

Shapes: N query heads, M key/value heads, T tokens, H head dim.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesys.data.pieces import rank_batch
from moesys.data.plan_ahead import costs_from_json
from moesys.data.sequence_loader import SequenceLoader
from moesys.data.step_batch import StepBatch
from moesys.parallel.pieces import PieceAttention
from moesys.parallel.ring import Ring
from moesys.plan.batch.cost import AttentionKind, BatchCosts
from moesys.plan.batch.local import LocalPiece, LocalPieces
from moesys.plan.batch.plan import Piece
from moesys.train.folder import write_text
from moesys.train.setup import Run
from moesys.train.step import TrainStep

REPEATS = 5
"""Of each probe, in turns; the median counts, since steps too are held up by what holds up these."""
NUM_SHORT = 16
"""Pieces of the probe with many, and of the rehearsal that fills a rank; the other has one of them."""
LEAST_S = 1e-12
"""What is timed takes this at least."""


def choose_batch_costs(run: Run, train_step: TrainStep, dtype: torch.dtype) -> dict[str, Any]:
    """Let the loader plan by them; return them as the start record has them. Collective, and draws random numbers.

    What this run folder's first start measured on this layout is kept: other costs may make other plans, which round otherwise.
    """
    loader, batch = run.loader, run.config.batch
    if not isinstance(loader, SequenceLoader) or batch.costs == "formula":
        return {}
    path = run.folder / "batch_costs.json"
    layout = [run.process.device.type, asdict(run.meshes.dims)]
    saved = json.loads(path.read_text()) if path.exists() else {}
    if run.config.checkpoint.resume and saved.get("layout") == layout:
        costs = costs_from_json(saved["costs"])
    else:
        costs = measured_costs(run, train_step, dtype)
        if run.process.rank == 0:  # all ranks have looked
            write_text(path, json.dumps({"costs": asdict(costs), "layout": layout}) + "\n")
    loader.plan_by(costs)
    return {"batch_costs": asdict(costs)}


def measured_costs(run: Run, train_step: TrainStep, dtype: torch.dtype) -> BatchCosts:
    """The mean over ranks, the same on all to the bit. Collective."""
    capacity = run.config.train.micro_batch_tokens
    pair_s, piece_s = _attention(run, dtype, capacity)
    kinds = (AttentionKind(pair_s=pair_s),)
    attention = BatchCosts(attention=kinds, token_s=0.0, piece_s=piece_s)
    many_S = np.full(NUM_SHORT, max(1, capacity // NUM_SHORT))
    probes = [many_S, many_S[:1]]
    rehearsals = [_rehearsal(run, train_step, lengths_S) for lengths_S in probes]
    many_s, few_s = (
        seconds - float(attention.rank_s(lengths_S, 1).sum())
        for lengths_S, seconds in zip(probes, _medians(run, rehearsals), strict=True)
    )
    token_s, micro_step_s = slope(int(many_S.sum()), many_s, int(many_S[0]), few_s)
    block_token_s, hop_s = _ring(run, dtype, capacity)
    return BatchCosts(
        attention=kinds,
        token_s=token_s,
        piece_s=piece_s,
        micro_step_s=micro_step_s,
        block_token_s=block_token_s,
        hop_s=hop_s,
    )


def slope(many: int, many_s: float, few: int, few_s: float) -> tuple[float, float]:
    """Seconds of each, and beside them, of so many and of a few; neither is below 0, and where noise says so all are of each."""
    each_s = (many_s - few_s) / (many - few)
    if not 0 < each_s <= many_s / many:
        each_s = max(many_s / many, LEAST_S)
    return each_s, max(0.0, many_s - many * each_s)


def _attention(run: Run, dtype: torch.dtype, num_tokens: int) -> tuple[float, float]:
    """Seconds of a query with a key, and of a piece, in all layers."""
    probes = [_attention_probe(run, dtype, [num_tokens // n] * n) for n in (1, NUM_SHORT)]
    whole_s, many_s = _medians(run, probes)
    whole, many = (n * _pairs(num_tokens // n) for n in (1, NUM_SHORT))
    # whole_s is of whole pairs and of a piece; so many times that is of as many pieces as many_s.
    pair_s, _ = slope(NUM_SHORT * whole, NUM_SHORT * whole_s, many, many_s)
    layers = run.config.model.total_layers
    return layers * pair_s, layers * max(0.0, many_s - pair_s * many) / NUM_SHORT


def _pairs(length: int) -> int:
    return length * (length + 1) // 2


def _attention_probe(run: Run, dtype: torch.dtype, lengths: list[int]) -> Callable[[], float]:
    """Forward and backward of one layer's attention on one rank."""
    model, device, tp = run.config.model, run.process.device, run.meshes.dims.tp
    pieces = LocalPieces(tuple(LocalPiece(n, (0,), 0) for n in lengths))
    heads = (model.total_heads // tp, *[model.total_kv_heads // tp] * 2)
    shape = pieces.num_tokens, model.resolved_head_dim
    q, k, v = (
        torch.randn((1, n, *shape), device=device, dtype=dtype, requires_grad=True) for n in heads
    )
    core = PieceAttention(run.meshes.replica_group)
    grad = torch.randn_like(q)
    return _timed(device, lambda: torch.autograd.grad(core(q, k, v, pieces), (q, k, v), grad))


def _medians(run: Run, probes: Sequence[Callable[[], float]]) -> list[float]:
    """Seconds of each, run in turns: the mean over ranks."""
    device = run.process.device
    times: list[list[float]] = [[] for _ in probes]
    for _ in range(REPEATS):
        for of_probe, probe in zip(times, probes, strict=True):
            dist.barrier()
            of_probe.append(probe())
    means = torch.tensor(
        [statistics.median(of_probe) for of_probe in times], dtype=torch.float64, device=device
    )
    dist.all_reduce(means)
    return (means / run.process.world_size).tolist()


def _timed(device: torch.device, work: Callable[[], object]) -> Callable[[], float]:
    """Does it, and returns seconds."""

    def seconds() -> float:
        began_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began_s

    return seconds


def _rehearsal(run: Run, train_step: TrainStep, lengths: np.ndarray) -> Callable[[], float]:
    """A micro-step in which every rank has sequences of these lengths, forward and backward."""
    dims, dp_rank, vocab_size = run.meshes.dims, run.meshes.dp_rank, run.config.model.vocab_size
    everyone = np.tile(lengths, dims.dp)
    micro_step = tuple(Piece(s, (s // len(lengths),)) for s in range(len(everyone)))
    rng = np.random.default_rng(run.process.rank)
    tokens_S = [rng.integers(0, vocab_size, length + 1) for length in everyone.tolist()]
    batch = rank_batch(micro_step, everyone, dp_rank, tokens_S, run.config.model.mtp_depth, dims.tp)
    # A router that replays a recorded step may know of fewer places than a rehearsal has.
    batch = replace(batch, places_BS=torch.zeros_like(batch.places_BS))
    pipeline = train_step.parallel.pipeline
    number = 1 if pipeline is None else pipeline.with_empty(1)
    step = StepBatch(micro_batches=[batch] * number, lengths_L=np.tile(everyone, number))
    # A pipeline's micro-steps overlap: each stage has its share of one at a time.
    share = dims.pp / (number + dims.pp - 1)
    return lambda: share * train_step.rehearse(step)


def _ring(run: Run, dtype: torch.dtype, num_tokens: int) -> tuple[float, float]:
    """Seconds of a token's block from one rank to the next, and of the hop beside it, in all layers.

    A ring over all ranks is timed with blocks of few tokens and of many, without the work that they go beside.
    """
    meshes, model = run.meshes, run.config.model
    size = dist.get_world_size(meshes.replica_group)
    if size == 1:
        return 0.0, 0.0
    ring = Ring(meshes.replica_group, range(size), dist.get_rank(meshes.replica_group))
    rows = max(NUM_SHORT, num_tokens), 1
    many_s, few_s = _medians(run, [_round_probe(run, ring, dtype, number) for number in rows])
    token_s, hop_s = slope(rows[0], many_s, rows[1], few_s)
    layers_of_hops = model.total_layers / (size - 1)
    return layers_of_hops * token_s, layers_of_hops * hop_s


def _round_probe(run: Run, ring: Ring, dtype: torch.dtype, rows: int) -> Callable[[], float]:
    """What passes around the ring in one layer: keys and values in forward and backward, their gradients in fp32 beside."""
    model, device, tp = run.config.model, run.process.device, run.meshes.dims.tp
    shape = 1, model.total_kv_heads // tp, rows, model.resolved_head_dim
    keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]
    grads = [torch.zeros(shape, device=device, dtype=torch.float32) for _ in range(2)]

    def passed() -> None:
        for blocks in ([keys], [keys, grads]):
            for _ in range(1, ring.size):
                for transfer in [ring.shift(block, rows) for block in blocks]:
                    transfer.wait()

    return _timed(device, passed)
