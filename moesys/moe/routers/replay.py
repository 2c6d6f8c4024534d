"""The experts that a recorded run gave each token, for the same routing under other weights, layouts or codecs.

Shapes: T tokens, E experts, K experts per token, M MoE layers, N tokens of an optimizer step.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesys.moe.choices import open_choices, recorded_steps
from moesys.moe.routers.topk import TopKRouter
from moesys.moe.routing import RoutingResult, StepLoad
from moesys.moe.tokens import Tokens


class ReplayRouter(TopKRouter):
    """In its s-th step each token gets the experts that it had in the run's s-th recorded step, in the same layer.

    `run` is a run folder with recorded choices (`metrics.record_choices_steps`), read when the first step begins; past the
    last it begins anew. Weights and gradients are those of the present scores, as in TopKRouter, which also routes where no
    step is: in evaluation. Megatron-core and RL training (R3, 2510.11370) call this routing replay. Each forward of a step
    waits for the device, and reads rows of a file.
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
        self._run = run
        self._num_experts = num_experts
        self._layer, self._num_layers = layer, num_layers
        self._files: list[Path] = []
        self._opened: tuple[Path, NDArray[np.int16]] | None = None
        """A step's file, and of it this layer's [N, K]."""
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
        """Raises ValueError where the recorded step had another number of tokens."""
        if self._opened is not None and len(self._opened[1]) != load.num_tokens:
            raise ValueError(self._unequal(load.num_tokens))
        self.steps_done += 1

    def _recorded(self, places_T: Tensor) -> Tensor:
        places = places_T.cpu().numpy()
        chosen_NK = self._of_step(int(self.steps_done))
        if places.max(initial=-1) >= len(chosen_NK):
            raise ValueError(self._unequal(None))
        chosen_TK = chosen_NK[places].astype(np.int64)
        return torch.from_numpy(chosen_TK).to(places_T.device)

    def _unequal(self, num_tokens: int | None) -> str:
        assert self._opened is not None
        path, chosen_NK = self._opened
        had = "more" if num_tokens is None else f"{num_tokens}"
        return (
            f"{path} has choices of {len(chosen_NK)} tokens, and this step has {had}: "
            "replay with the train.global_batch_tokens of the recorded run"
        )

    def _of_step(self, step: int) -> NDArray[np.int16]:
        """[N, K] of the `step`-th recorded one. Raises ValueError where it is another model's."""
        self._files = self._files or recorded_steps(Path(self._run))
        if not self._files:
            raise ValueError(
                f"run={self._run} has no recorded choices: train it with metrics.record_choices_steps above 0"
            )
        path = self._files[step % len(self._files)]
        if self._opened is None or self._opened[0] != path:
            self._opened = path, self._checked(path)
        return self._opened[1]

    def _checked(self, path: Path) -> NDArray[np.int16]:
        choices_MNK = open_choices(path)
        layers, _, slots = choices_MNK.shape
        if (layers, slots) != (self._num_layers, self.top_k):
            raise ValueError(
                f"{path} has {layers} MoE layers with {slots} experts per token, this model {self._num_layers} with "
                f"{self.top_k}: replay a run of the same shape"
            )
        chosen_NK = choices_MNK[self._layer]
        least, most = int(chosen_NK.min(initial=0)), int(chosen_NK.max(initial=0))
        if least < 0 or most >= self._num_experts:
            raise ValueError(
                f"{path} has choices of experts {least} to {most} in layer {self._layer}, and this model's are 0 to "
                f"{self._num_experts - 1}"
                + (": where slots have no expert (-1) nothing can be replayed" if least < 0 else "")
            )
        return chosen_NK
