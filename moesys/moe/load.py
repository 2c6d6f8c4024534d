"""How many slots each expert was given: counted once per trained token, read once per optimizer step.

Shapes: E experts.
"""

import torch
from torch import Tensor


class ExpertLoad:
    """This rank's slots per expert of one layer since `take`, before anything is dropped; int64."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts_E: Tensor | None = None
        self._dropped: Tensor | None = None

    def add(self, routed_E: Tensor, kept_E: Tensor) -> None:
        """Count a training forward: the slots that the router gave each expert, and those that the capacity left."""
        dropped = (routed_E - kept_E).sum()
        self._counts_E = routed_E if self._counts_E is None else self._counts_E + routed_E
        self._dropped = dropped if self._dropped is None else self._dropped + dropped

    def take(self, device: torch.device) -> Tensor:
        """Return int64 [E + 1], the counts and then the dropped slots, and start over."""
        taken = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=device)
        if self._counts_E is not None and self._dropped is not None:
            taken[:-1] = self._counts_E
            taken[-1] = self._dropped
        self._counts_E = self._dropped = None
        return taken
