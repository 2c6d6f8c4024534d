"""Which share of each micro-batch's activations waits in host memory, where the configuration leaves that to measurements."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from moesys.config.schema import RunConfig
from moesys.models.attention import Within
from moesys.plan.activations import token_bytes
from moesys.plan.batch.local import LocalPieces
from moesys.plan.offload import HostLink, OffloadCosts, layer_costs
from moesys.profile.host_link import host_link
from moesys.profile.matmul import matmul_tflops
from moesys.train.setup import Run


def measure_offload(run: Run, dtype: torch.dtype) -> dict[str, Any]:
    """Let as much leave as nobody waits for by this rank's link and product; what the start record has of it.

    Layers do not reach the rate of a large product, so they take longer than is counted here, and what leaves is hidden.
    """
    config, offload = run.config, run.parallel.offload
    if offload is None or config.train.offload_ratio is not None:
        return {}
    device = run.process.device
    link = host_link(device)
    tflops = config.metrics.peak_tflops or matmul_tflops(device, dtype)
    offload.ratio_of = hidden_ratio(config, link, tflops * 1e12)
    return {
        "offload": {
            "out_gbytes_per_s": link.out_bytes_per_s / 1e9,
            "back_gbytes_per_s": link.back_bytes_per_s / 1e9,
            "start_us": link.start_s * 1e6,
        }
    }


def hidden_ratio(
    config: RunConfig, link: HostLink, flops_per_s: float
) -> Callable[[Within | None], float]:
    """Of a micro-batch, by what its attention stays within (plan/offload.py)."""
    costs = OffloadCosts(
        link=link,
        costs=layer_costs(config.model, flops_per_s * config.parallel.tp),
        layers=config.model.total_layers,
        token_bytes=token_bytes(config),
    )
    return lambda within: costs.hidden_ratio(*lengths_and_sizes(config, within))


def lengths_and_sizes(
    config: RunConfig, within: Within | None
) -> tuple[Sequence[int], int | list[int]]:
    """Of a micro-batch's sequences, and over how many ranks each lies."""
    if isinstance(within, LocalPieces):
        pieces = within.pieces
        return [piece.length for piece in pieces], [len(piece.ranks) for piece in pieces]
    if within is None:
        seq_len = config.data.seq_len
        return [seq_len] * (config.train.micro_batch_tokens // seq_len), config.parallel.cp
    spans = (pairwise((0, *ends)) for ends in within)
    return [end - begin for of_sample in spans for begin, end in of_sample], config.parallel.cp
