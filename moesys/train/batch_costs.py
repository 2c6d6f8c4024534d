"""What pieces of sequences cost on this machine, by which batches are planned: timed at the start, kept in the run's folder.

Attention is timed alone, on one piece and on many; all else by two rehearsals of a micro-step, of which attention is taken off; what
rings pass on by the speed of the links.

Shapes: N query heads, M key/value heads, T tokens, H head dim.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesys.data.pieces import rank_batch
from moesys.data.plan_ahead import costs_from_json
from moesys.data.sequence_loader import SequenceLoader
from moesys.data.step_batch import StepBatch
from moesys.parallel.dims import nodes_and_rails
from moesys.parallel.links import measured_links
from moesys.parallel.pieces import PieceAttention
from moesys.plan.batch.cost import AttentionKind, BatchCosts, block_token_bytes
from moesys.plan.batch.local import LocalPiece, LocalPieces
from moesys.plan.batch.plan import Piece
from moesys.train.folder import write_text
from moesys.train.setup import Run
from moesys.train.step import TrainStep

REPEATS = 3
"""Of each probe, of which the shortest counts."""
NUM_SHORT = 16
"""Pieces of the probe with many, and of the larger rehearsal."""
TRANSFERS = 3
"""In a layer, from one rank of a ring to the next: keys in forward, keys and their gradients in backward."""


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
    no_rest = BatchCosts(attention=kinds, token_s=0.0, piece_s=piece_s)
    tokens_of_probes = [
        np.full(NUM_SHORT, max(1, capacity // (2 * NUM_SHORT))),
        np.full(1, max(1, capacity // (2 * NUM_SHORT))),
    ]
    rest_s = [
        _rehearsed(run, train_step, lengths) - float(no_rest.rank_s(lengths, 1).sum())
        for lengths in tokens_of_probes
    ]
    many, few = (int(lengths.sum()) for lengths in tokens_of_probes)
    token_s = max(0.0, rest_s[0] - rest_s[1]) / max(1, many - few)
    micro_step_s = max(0.0, rest_s[1] - few * token_s)
    block_token_s, hop_s = _ring(run)
    return BatchCosts(
        attention=kinds,
        token_s=token_s,
        piece_s=piece_s,
        micro_step_s=micro_step_s,
        block_token_s=block_token_s,
        hop_s=hop_s,
    )


def _attention(run: Run, dtype: torch.dtype, num_tokens: int) -> tuple[float, float]:
    """Seconds of a query with a key, and of a piece, in all layers."""
    whole, many = (
        _mean_of_ranks(run, _shortest(run, _attention_probe(run, dtype, [num_tokens // n] * n)))
        for n in (1, NUM_SHORT)
    )
    pairs = [n * _pairs(num_tokens // n) for n in (1, NUM_SHORT)]
    # whole = pair_s * pairs[0] + piece_s, many = pair_s * pairs[1] + NUM_SHORT * piece_s
    pair_s = (NUM_SHORT * whole - many) / max(1, NUM_SHORT * pairs[0] - pairs[1])
    pair_s = min(max(pair_s, 0.0), whole / max(1, pairs[0]))
    piece_s = max(0.0, many - pair_s * pairs[1]) / NUM_SHORT
    layers = run.config.model.total_layers
    return layers * pair_s, layers * piece_s


def _pairs(length: int) -> int:
    return length * (length + 1) // 2


def _attention_probe(run: Run, dtype: torch.dtype, lengths: list[int]) -> Callable[[], object]:
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
    return lambda: torch.autograd.grad(core(q, k, v, pieces), (q, k, v), grad)


def _shortest(run: Run, probe: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        began = time.perf_counter()
        probe()
        if run.process.device.type == "cuda":
            torch.cuda.synchronize(run.process.device)
        times.append(time.perf_counter() - began)
    return min(times)


def _rehearsed(run: Run, train_step: TrainStep, lengths: np.ndarray) -> float:
    """Seconds of a micro-step in which every rank has sequences of these lengths, forward and backward."""
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
    seconds = min(train_step.rehearse(step) for _ in range(REPEATS))
    # A pipeline's micro-steps overlap: each stage has its share of one at a time.
    return _mean_of_ranks(run, seconds) * dims.pp / (number + dims.pp - 1)


def _ring(run: Run) -> tuple[float, float]:
    """Seconds of a token's block from one rank to the next, and of the hop beside it, in all layers."""
    config, meshes = run.config, run.meshes
    per_node = meshes.ranks_per_node or meshes.dims.world_size
    ranks = dist.get_process_group_ranks(meshes.replica_group)
    if len(ranks) == 1:
        return 0.0, 0.0
    on_node = len(nodes_and_rails(ranks, per_node)[0][0])
    links = measured_links(meshes.replica_group, on_node, run.process.device)
    slowest = max((link for link in links if link is not None), key=lambda link: link.seconds(1e6))
    layers = config.model.total_layers
    moved_bytes = block_token_bytes(config.model, config.train.compute_bytes) / meshes.dims.tp
    return moved_bytes / slowest.bytes_per_s, TRANSFERS * layers * slowest.latency_s


def _mean_of_ranks(run: Run, seconds: float) -> float:
    mean = torch.tensor(seconds, dtype=torch.float64, device=run.process.device)
    dist.all_reduce(mean)
    return mean.item() / run.process.world_size
