"""What a layer routed: counted once per trained token, read once per optimizer step.

Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor


class ExpertLoad:
    """This rank's slots per expert of one layer since `take`, before anything is dropped, and how sure its router was."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts_E: Tensor | None = None
        self._dropped: Tensor | None = None
        self._entropy: Tensor | None = None

    @torch.no_grad()
    def add(self, routed_E: Tensor, kept_E: Tensor, probs_TE: Tensor) -> None:
        """Count a training forward: the slots that the router gave each expert, those that the capacity left, and the
        entropy of each token's probabilities."""
        dropped = (routed_E - kept_E).sum()
        entropy = torch.special.entr(probs_TE).sum(dtype=torch.float64)
        self._counts_E = routed_E if self._counts_E is None else self._counts_E + routed_E
        self._dropped = dropped if self._dropped is None else self._dropped + dropped
        self._entropy = entropy if self._entropy is None else self._entropy + entropy

    def take(self, device: torch.device) -> Tensor:
        """Return int64 [E + 1], the counts and then the dropped slots, and start over."""
        taken = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=device)
        if self._counts_E is not None and self._dropped is not None:
            taken[:-1] = self._counts_E
            taken[-1] = self._dropped
        self._counts_E = self._dropped = None
        return taken

    def take_entropy(self, device: torch.device) -> Tensor:
        """Return the sum over tokens, nats, an fp64 scalar, and start over."""
        taken, self._entropy = self._entropy, None
        return torch.zeros((), dtype=torch.float64, device=device) if taken is None else taken
