"""What a run learns of its machine before the first step."""

from typing import Any

import torch

from moesys.train.backend_choice import choose_backend
from moesys.train.batch_costs import choose_batch_costs
from moesys.train.offload import measure_offload
from moesys.train.setup import Run
from moesys.train.step import TrainStep


def measure(run: Run, train_step: TrainStep, dtype: torch.dtype) -> dict[str, Any]:
    """The experts' backend, the speed of links, what pieces of sequences cost, the way to the host, as the start record has
    them. Collective."""
    found = choose_backend(run, dtype) | train_step.placements.measure()
    return found | choose_batch_costs(run, train_step, dtype) | measure_offload(run, dtype)
