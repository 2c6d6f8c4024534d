"""A small run whose rows are written in fewer bits, or travel as fewer rows."""

from dataclasses import replace

import torch

from moesys.config.dispatch_schema import DispatchConfig, Wire, WireConfig
from moesys.config.schema import (
    ComponentConfig,
    OptimConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
)
from moesys.testing.parity import Numbers
from moesys.testing.small_run import small_config, small_model


def all_four(kind: Wire) -> WireConfig:
    """Ways in one format."""
    return WireConfig(
        dispatch_forward=kind,
        dispatch_backward=kind,
        combine_forward=kind,
        combine_backward=kind,
        block=10,
    )


INT8 = all_four("int8")
LSH = ComponentConfig(
    target="moesys.moe.codecs.LshCodec",
    options={"hashes": 2, "dimensions": 2, "error_bound": None},
)
TREE = ComponentConfig(target="moesys.moe.codecs.TreeCodec", options={"error_bound": 0.6})
PLAIN = small_config(
    small_model(num_layers=4),
    seq_len=16,
    sequences=8,
    steps=2,
    optim=OptimConfig(lr=1e-3, eps=1e-5),
    parallel=ParallelConfig(ep=2),
)


def config(dispatch: DispatchConfig, recompute: Recompute = "none", **degrees: int) -> RunConfig:
    return replace(
        PLAIN,
        dispatch=dispatch,
        train=replace(PLAIN.train, recompute=recompute),
        parallel=ParallelConfig(**{"ep": 2} | degrees),
    )


def assert_equal(found: list[Numbers], expected: list[Numbers]) -> None:
    """Every rank's losses and gradients, bit for bit."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [r.loss for r in ours.results] == [r.loss for r in theirs.results]
        for step, gradients in enumerate(theirs.gradients):
            for name, gradient in gradients.items():
                assert torch.equal(ours.gradients[step][name], gradient), name
