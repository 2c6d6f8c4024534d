"""Loads of experts over steps, as run folders whose loads LoadReplayRouter plays again. Pure but for writing.

Shapes: S steps, M MoE layers, E experts.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.fssdp.loads import drawn, moving_hotspot, zipf_shares
from moesys.moe.routers.load_replay import recorded_loads

Loads = NDArray[np.int64]
"""[S, M, E]: slots of each expert."""
SLOTS, TOP_K = 65_536, 2
"""Of a step. Each token's are drawn by themselves: loads waver as they do where nothing binds tokens together."""
HOT_TIMES = 6.0
"""The others' share, that a hotspot has: 29 % of the slots of 16 experts."""
STAYS_STEPS = 5
"""A hotspot at an expert."""


def zipf_loads(exponent: float, steps: int, layers: int, experts: int, shuffled: bool) -> Loads:
    """The i-th hottest expert of a layer has 1 / i^exponent of the hottest one's load. They are in this order, so that those of
    rank 0 are the hottest, or shuffled, otherwise in each layer."""
    rng = np.random.default_rng(0)
    shares_E = zipf_shares(experts, exponent, TOP_K)
    shares_ME = np.stack(
        [rng.permutation(shares_E) if shuffled else shares_E for _ in range(layers)]
    )
    return drawn(rng, np.broadcast_to(shares_ME, (steps, layers, experts)), SLOTS, clump=1)


def hotspot_loads(steps: int, layers: int, experts: int) -> Loads:
    """All alike but one expert of each layer, every few steps another."""
    rng = np.random.default_rng(1)
    shares_SME = np.stack(
        [moving_hotspot(rng, steps, experts, STAYS_STEPS, HOT_TIMES) for _ in range(layers)], axis=1
    )
    return drawn(rng, shares_SME, SLOTS, clump=1)


def recorded(run: Path, first_step: int = 1, steps: int | None = None) -> Loads:
    """Of a run, from this step on, so many or all."""
    loads_SME = np.stack([load_SE.numpy() for load_SE in recorded_loads(str(run))], axis=1)
    return loads_SME[first_step - 1 :][:steps]


def write_run(folder: Path, loads_SME: Loads) -> Path:
    """A run folder that says no more than its loads."""
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"kind": "train", "step": step, "expert_load": load_ME.tolist()})
        for step, load_ME in enumerate(loads_SME, 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


Trace = Callable[[int, int, int], Loads]
"""From steps, layers and experts."""


def synthetic() -> Mapping[str, Trace]:
    """By name."""
    return {
        "uniform": lambda s, m, e: zipf_loads(0.0, s, m, e, shuffled=False),
        "zipf 0.6": lambda s, m, e: zipf_loads(0.6, s, m, e, shuffled=False),
        "zipf 1.0": lambda s, m, e: zipf_loads(1.0, s, m, e, shuffled=False),
        "zipf 1.2": lambda s, m, e: zipf_loads(1.2, s, m, e, shuffled=False),
        "zipf 1.2, shuffled": lambda s, m, e: zipf_loads(1.2, s, m, e, shuffled=True),
        "moving hotspot": hotspot_loads,
    }
