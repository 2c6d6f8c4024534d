"""Writes what routers choose for each token of a training step, the same whatever the layout.

Shapes: M MoE layers, N tokens of an optimizer step, T tokens of one forward on this rank, K experts per token.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.schema import RunConfig
from moesys.models.transformer import Transformer
from moesys.moe.choices import write_choices
from moesys.moe.layer import MoELayer
from moesys.moe.listening import Listening
from moesys.moe.routing import RoutingResult
from moesys.moe.tokens import Known
from moesys.train.folder import may_fail


class ChoiceRecorder:
    """Of the first `metrics.record_choices_steps` steps, also of those that are done again. Every rank has one; global rank
    0 writes.

    A rank holds its own tokens' choices, and for a moment all of one layer; rank 0 all, two bytes each on the host.
    """

    def __init__(self, config: RunConfig, model: Transformer, device: torch.device) -> None:
        self._config, self._device = config, device
        self._steps = config.metrics.record_choices_steps if config.model.moe_layers else 0
        self._heard: list[tuple[int, Tensor, Tensor]] = []
        """Layer, places [T], experts [T, K]."""
        self._listening = Listening(model.moe_places(), self._hear)

    def recording(self, step: int) -> AbstractContextManager[object]:
        """Around the forwards of `step`."""
        self._heard.clear()
        return self._listening if step <= self._steps else nullcontext()

    def write(self, step: int, num_tokens: int) -> None:
        """Collective. What was chosen in `step` of so many tokens, which has moved weights."""
        if step > self._steps:
            return
        choices: list[np.ndarray] = []
        for layer in range(len(self._config.model.moe_layers)):
            chosen_NK = self._of_all_ranks(layer, num_tokens)
            if dist.get_rank() == 0:
                choices.append((chosen_NK - 1).to("cpu", torch.int16).numpy())
        if choices:
            run_dir = Path(self._config.run.dir)
            with may_fail(run_dir, f"the choices of step {step} are not recorded"):
                write_choices(run_dir, step, np.stack(choices))

    def _of_all_ranks(self, layer: int, num_tokens: int) -> Tensor:
        """int32 [N, K] on global rank 0; experts count from 1, so that a sum over ranks joins what each has."""
        shape = (num_tokens, self._config.model.moe.top_k)
        chosen_NK = torch.zeros(shape, dtype=torch.int32, device=self._device)
        for at, places_T, ids_TK in self._heard:
            if at == layer:
                chosen_NK[places_T] = ids_TK + 1
        dist.reduce(chosen_NK, dst=0)
        return chosen_NK

    def _hear(self, at: int, layer: MoELayer, known: Known, routed: RoutingResult) -> None:
        if not layer.training or known.places_U is None:
            return
        ids_TK = routed.topk_ids_TK
        if routed.blend is not None or ids_TK.shape[1] != layer.config.top_k:
            raise ValueError(
                f"metrics.record_choices_steps={self._steps} needs a router that gives "
                f"each token model.moe.top_k={layer.config.top_k} experts, which {layer.config.router.target} does "
                "not: set it to 0"
            )
        places_T = layer.share.own_run(known.places_U, len(ids_TK))
        self._heard.append((at, places_T, ids_TK.int()))
