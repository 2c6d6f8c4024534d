"""How well the next step's loads are predicted, and what that costs in level: the predictors of training on loads that were recorded,
and on some that were drawn.

Shapes: S steps, M MoE layers, E experts, P ranks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fssdp.loads import (
    drawn,
    drifting,
    linear_drift,
    moving_hotspot,
    zipf_shares,
)
from benchmarks.fssdp.traces import recorded
from benchmarks.results import Cell
from moesys.config.placement_schema import PlacementConfig
from moesys.plan.expert_copies import planned_placements
from moesys.plan.load_prediction import PREDICTORS, predicted_loads, steps_needed
from moesys.plan.placement import Amounts, Integers, even_owners, owners_alone
from moesys.plan.repair import expected_loads

NUM_RANKS, PER_NODE = 8, 2
CONFIG = PlacementConfig(policy="balanced")
EVERY_STEPS = 4
"""That so many apart are looked at."""
KNOWN_STEPS = max(steps_needed(predictor) for predictor in PREDICTORS)
"""Before the first of them."""
DRAWN_STEPS, DRAWN_LAYERS, DRAWN_EXPERTS, DRAWN_SLOTS = 200, 3, 16, 8192
"""About as recorded runs of this project have them."""


def predictor_rows(
    runs: Mapping[str, Path], every_steps: int = EVERY_STEPS
) -> list[dict[str, Cell]]:
    """One for each predictor and each of `runs` (folders, by names), then of the drawn loads. Deterministic."""
    of_runs = {name: recorded(run) for name, run in runs.items()}
    return [
        row
        for name, loads_SME in (of_runs | drawn_loads()).items()
        for row in rows_of(name, loads_SME, every_steps)
    ]


def drawn_loads() -> dict[str, Integers]:
    """[S, M, E], by name."""
    rng = np.random.default_rng(0)
    zipf_E = zipf_shares(DRAWN_EXPERTS, 0.6)
    shares = {
        "stationary": lambda: rng.permutation(zipf_E)[None].repeat(DRAWN_STEPS, axis=0),
        "order drifts": lambda: drifting(rng, DRAWN_STEPS, zipf_E),
        "hotspot moves": lambda: moving_hotspot(
            rng, DRAWN_STEPS, DRAWN_EXPERTS, every_steps=25, times=4.0
        ),
        "linear drift": lambda: linear_drift(rng, DRAWN_STEPS, zipf_E, lap_steps=50),
    }
    return {
        name: drawn(rng, np.stack([make() for _ in range(DRAWN_LAYERS)], axis=1), DRAWN_SLOTS)
        for name, make in shares.items()
    }


def rows_of(name: str, loads_SME: Integers, every_steps: int = EVERY_STEPS) -> list[dict[str, Any]]:
    """One for each predictor. Raises ValueError where there are not enough steps."""
    steps = range(KNOWN_STEPS, len(loads_SME), every_steps)
    if not steps:
        raise ValueError(
            f"{name} has {len(loads_SME)} steps: predictors are compared from step {KNOWN_STEPS + 1} on"
        )
    owners = np.mean([levels(loads_SME[s], None) for s in steps])
    known = np.mean([levels(loads_SME[s], loads_SME[s].astype(np.float64)) for s in steps])
    found = []
    for predictor in PREDICTORS:
        predicted = {
            s: predicted_loads(loads_SME[:s], predictor, CONFIG.window_steps) for s in steps
        }
        far = [distance(predicted_ME, loads_SME[s]) for s, predicted_ME in predicted.items()]
        planned = [levels(loads_SME[s], predicted_ME) for s, predicted_ME in predicted.items()]
        found.append(
            {
                "loads": name,
                "predictor": predictor,
                "steps": len(steps),
                "distance": round(float(np.mean(far)), 4),
                "max_over_mean": round(float(np.mean(planned)), 4),
                "if_loads_known": round(float(known), 4),
                "owners_alone": round(float(owners), 4),
            }
        )
    return found


def distance(predicted_ME: Amounts, loads_ME: Integers) -> float:
    """Total variation of shares of slots, mean of layers: the part of rows that goes elsewhere."""
    predicted_ME = predicted_ME / predicted_ME.sum(1, keepdims=True)
    shares_ME = loads_ME / loads_ME.sum(1, keepdims=True)
    return float(np.abs(predicted_ME - shares_ME).sum(1).mean() / 2)


def levels(loads_ME: Integers, predicted_ME: Amounts | None) -> float:
    """Rows of the busiest rank over the mean, mean of layers, after a plan from `predicted_ME`; None: owners serve all."""
    owner_E = even_owners(loads_ME.shape[1], NUM_RANKS)
    if predicted_ME is None:
        placements = [owners_alone(owner_E, NUM_RANKS)] * len(loads_ME)
    else:
        owners_M = [owner_E] * len(loads_ME)
        placements = planned_placements(CONFIG, list(predicted_ME), owners_M, NUM_RANKS, PER_NODE)
    of_layers = [
        expected_loads(loads_E.astype(np.float64), placement)[1]
        for loads_E, placement in zip(loads_ME, placements, strict=True)
    ]
    return float(np.mean([loads_P.max() / loads_P.mean() for loads_P in of_layers]))
