"""Writes what routers choose for each token of a training step, the same whatever the layout.

Shapes: M MoE layers, N tokens of an optimizer step, T tokens of one forward on this rank, K experts per token.
"""

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


class ChoiceRecorder:
    """Of the first `metrics.record_choices_steps` steps. Every rank has one; global rank 0 writes.

    A rank holds its own tokens' choices, and for a moment all of one layer; rank 0 all, two bytes each on the host.
    """

    def __init__(self, config: RunConfig, model: Transformer, device: torch.device) -> None:
        self._config, self._device = config, device
        self._heard: list[tuple[int, Tensor, Tensor]] = []
        """Layer, places [T], experts [T, K]."""
        self._listening = Listening(model.moe_places(), self._hear).__enter__()

    def end_step(self, step: int, is_applied: bool) -> bool:
        """Collective. Write the choices of `step`, if it moved weights; whether there may be more to record."""
        last = self._config.metrics.record_choices_steps
        if is_applied and step <= last:
            choices = [self._of_all_ranks(at) for at in range(len(self._config.model.moe_layers))]
            if dist.get_rank() == 0:
                write_choices(Path(self._config.run.dir), step, np.stack(choices))
        self._heard.clear()
        if step >= last:
            self._listening.__exit__(None, None, None)
        return step < last

    def _of_all_ranks(self, layer: int) -> np.ndarray:
        """int16 [N, K] on global rank 0."""
        shape = (self._config.train.global_batch_tokens, self._config.model.moe.top_k)
        # Experts count from 1: a sum over ranks joins what each has.
        chosen_NK = torch.zeros(shape, dtype=torch.int32, device=self._device)
        for at, places_T, ids_TK in self._heard:
            if at == layer:
                chosen_NK[places_T] = ids_TK + 1
        dist.reduce(chosen_NK, dst=0)
        return (chosen_NK - 1).cpu().numpy().astype(np.int16)

    def _hear(self, at: int, layer: MoELayer, known: Known, routed: RoutingResult) -> None:
        if not layer.training or known.places_U is None:
            return
        ids_TK = routed.topk_ids_TK
        if routed.blend is not None or ids_TK.shape[1] != layer.config.top_k:
            raise ValueError(
                f"metrics.record_choices_steps={self._config.metrics.record_choices_steps} needs a router that gives "
                f"each token model.moe.top_k={layer.config.top_k} experts, which {layer.config.router.target} does "
                "not: set it to 0"
            )
        places_T = layer.share.own_run(known.places_U, len(ids_TK))
        self._heard.append((at, places_T, ids_TK.int()))
