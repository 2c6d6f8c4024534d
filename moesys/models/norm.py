"""RMSNorm as torch's module, computed by our op."""

from torch import Tensor, nn

from moesys.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size]."""
        return rms_norm(x, self.weight, self.epsilon)
