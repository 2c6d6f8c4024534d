"""The experts that a recorded run gave each token, for the same routing under other weights, layouts or codecs.

Shapes: T tokens, E experts, K experts per token, M MoE layers, N tokens of an optimizer step.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesys.moe.choices import open_choices, recorded_steps
from moesys.moe.routers.topk import TopKRouter
from moesys.moe.routing import RoutingResult, StepLoad
from moesys.moe.tokens import Tokens


class ReplayRouter(TopKRouter):
    """In its s-th step each token gets the experts that it had in the run's s-th recorded step, in the same layer.

    `run` is a run folder with recorded choices (`metrics.record_choices_steps`); past the last it begins anew. Weights and
    gradients are those of the present scores, as in TopKRouter, which also routes where no step is: in evaluation.
    Megatron-core and RL training (R3, 2510.11370) call this routing replay. One host sync per forward.
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
        self._files = _checked(run, num_layers, num_experts, top_k)
        self._layer = layer
        self._replayed_TK: Tensor | None = None
        self.register_buffer("steps_done", torch.zeros(()))
        self.steps_done: Tensor

    def forward(
        self, x_TD: Tensor, state: Tensor | None = None, tokens: Tokens | None = None
    ) -> RoutingResult:
        if tokens is not None and tokens.places_T is not None:
            self._replayed_TK = self._recorded(tokens.places_T)
        try:
            return super().forward(x_TD, state)
        finally:
            self._replayed_TK = None

    def select(self, scores_TE: Tensor) -> Tensor:
        return super().select(scores_TE) if self._replayed_TK is None else self._replayed_TK

    @torch.no_grad()
    def end_step(self, load: StepLoad) -> None:
        self.steps_done += 1

    def _recorded(self, places_T: Tensor) -> Tensor:
        path = self._files[int(self.steps_done) % len(self._files)]
        chosen_NK = open_choices(path)[self._layer]
        if len(places_T) and int(places_T.max()) >= len(chosen_NK):
            raise ValueError(
                f"{path} has choices of {len(chosen_NK)} tokens, and this step has more: "
                "replay with the train.global_batch_tokens of the recorded run"
            )
        chosen_TK = chosen_NK[places_T.cpu().numpy()].astype(np.int64)
        return torch.from_numpy(chosen_TK).to(places_T.device)


@cache
def _checked(run: str, num_layers: int, num_experts: int, top_k: int) -> list[Path]:
    """One file for each recorded step. Raises ValueError where they are another model's."""
    files = recorded_steps(Path(run))
    if not files:
        raise ValueError(
            f"run={run} has no recorded choices: train it with metrics.record_choices_steps above 0"
        )
    choices_MNK = open_choices(files[0])
    layers, _, slots = choices_MNK.shape
    if (layers, slots) != (num_layers, top_k):
        raise ValueError(
            f"run={run} has {layers} MoE layers with {slots} experts per token, this model {num_layers} with {top_k}: "
            "replay a run of the same shape"
        )
    least, most = int(choices_MNK.min()), int(choices_MNK.max())
    if not 0 <= least <= most < num_experts:
        raise ValueError(
            f"run={run} has choices of experts {least} to {most}, and this model's are 0 to {num_experts - 1}"
            + (": where slots have no expert (-1) nothing can be replayed" if least < 0 else "")
        )
    return files
