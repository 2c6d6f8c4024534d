"""The loads of a recorded run, for measurements under routing as it really is. Not for training.

Shapes: T tokens, E experts, K experts per token, M MoE layers, S recorded steps.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesys.moe.routers.topk import TopKRouter
from moesys.moe.routing import StepLoad

_GOLDEN = 0.6180339887498949


class LoadReplayRouter(TopKRouter):
    """In step s each expert gets the share of slots that it had in the run's s-th recorded step, in the same layer.

    Tokens are given to experts by systematic sampling: with shares that sum to K, token t takes the experts at whose part
    of [0, K) lie u_t, u_t + 1, ..; u_t is spread evenly, so loads are those recorded but for rounding, and a token's
    experts are distinct. `run` is a run folder; past its end it begins anew. Weights are the learned scores', as a
    step of TopKRouter would have them.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        run: str,
        layer: int = 0,
        num_layers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k, **options)
        loads_M = recorded_loads(run)
        recorded = loads_M[layer].shape[1] if layer < len(loads_M) else 0
        if (len(loads_M), recorded) != (num_layers, num_experts):
            raise ValueError(
                f"router option run={run} has {len(loads_M)} MoE layers, layer {layer} of {recorded} experts, this "
                f"model {num_layers}, layer {layer} of {num_experts}: replay a run of the same shape"
            )
        self._loads_SE = loads_M[layer]
        self.register_buffer("steps_done", torch.zeros(()))
        self.steps_done: Tensor

    def select(self, scores_TE: Tensor) -> Tensor:
        """No host sync after the first."""
        self._loads_SE = self._loads_SE.to(scores_TE.device)
        step = self.steps_done.long() % self._loads_SE.shape[0]
        return sampled(self._loads_SE.index_select(0, step.view(1))[0], len(scores_TE), self.top_k)

    @torch.no_grad()
    def end_step(self, load: StepLoad) -> None:
        self.steps_done += 1


def sampled(load_E: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """int64 [T, K]: distinct experts for each token, in proportion to `load_E` (at most a share of 1 / K each)."""
    shares_E = load_E.double() * (top_k / load_E.sum())
    ends_E = shares_E.clamp(max=1.0).cumsum(0)
    ends_E = ends_E * (top_k / ends_E[-1])
    places_T = torch.arange(num_tokens, dtype=torch.float64, device=load_E.device) * _GOLDEN
    slots_K = torch.arange(top_k, device=load_E.device)
    places_TK = places_T.frac()[:, None] + slots_K
    return torch.searchsorted(ends_E, places_TK, right=True).clamp(max=len(load_E) - 1)


@cache
def recorded_loads(run: str) -> list[Tensor]:
    """Of each MoE layer int64 [S, E], from a run's metrics.jsonl. Raises ValueError where there is none."""
    path = Path(run) / "metrics.jsonl"
    try:
        with path.open(encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.endswith("\n")]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"run={run} must be a run folder: {error}") from error
    loads = [record["expert_load"] for record in records if record.get("kind") == "train"]
    if not loads or not loads[0]:
        raise ValueError(f"run={run} has no step with MoE layers in {path}")
    return [
        torch.tensor(load_SE, dtype=torch.int64, device="cpu")
        for load_SE in zip(*loads, strict=True)
    ]
