"""The layer of "Reducing Activation Recomputation" (2205.05198, sec. 4) from our tensor-parallel moves, to weigh it.

LayerNorm, unfused attention, GELU, dropout with masks of one byte, two bytes per activation. Shapes: T tokens of
the group, B sequences, S positions, N heads of this rank, H head dim, D model, O outputs of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesys.ops.projection import project
from moesys.parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class PaperShape:
    d_model: int
    num_heads: int
    seq_len: int
    samples: int
    dropout: float = 0.1


class PaperLayer(nn.Module):
    """`recompute`: none, selective (softmax(q k^T) v) or full."""

    def __init__(
        self, shape: PaperShape, tp: TensorParallel | None, recompute: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape, self.tp, self.recompute = shape, tp, recompute
        size, rank = (tp.size, tp.rank) if tp else (1, 0)
        width = shape.d_model
        generator = torch.Generator().manual_seed(0)

        def matrix(outputs: int, inputs: int, cut_dim: int) -> nn.Parameter:
            whole = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
            return nn.Parameter(whole.chunk(size, cut_dim)[rank].to(dtype).contiguous())

        self.wq, self.wk, self.wv = (matrix(width, width, 0) for _ in range(3))
        self.wo = matrix(width, width, 1)
        self.up = matrix(4 * width, width, 0)
        self.down = matrix(width, 4 * width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width, dtype=dtype) for _ in range(2))

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.recompute == "full":
            return checkpoint(self._layer, x_TD, use_reentrant=False)
        return self._layer(x_TD)

    def _layer(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD + self._dropout(self._attention(self.norms[0](x_TD)))
        return x_TD + self._dropout(self._mlp(self.norms[1](x_TD)))

    def _attention(self, x_TD: Tensor) -> Tensor:
        q, k, v = (self._heads(x) for x in self._enter(x_TD, self.wq, self.wk, self.wv))
        if self.recompute == "selective":
            out = checkpoint(self._core, q, k, v, use_reentrant=False)
        else:
            out = self._core(q, k, v)
        shape = self.shape
        out_TO = out.unflatten(0, (shape.samples, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        return self._leave(F.linear(out_TO, self.wo))

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each [B * N, S, H]."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
        future = torch.full(scores.shape[1:], float("-inf"), dtype=q.dtype).triu(1)
        return self._dropout((scores + future).softmax(-1)) @ v

    def _mlp(self, x_TD: Tensor) -> Tensor:
        (hidden_TO,) = self._enter(x_TD, self.up)
        return self._leave(F.linear(F.gelu(hidden_TO), self.down))

    def _heads(self, x_TO: Tensor) -> Tensor:
        """[T, N * H] to [B * N, S, H] in memory of its own."""
        head_dim = self.shape.d_model // self.shape.num_heads
        x_BSNH = x_TO.unflatten(-1, (-1, head_dim)).unflatten(0, (self.shape.samples, -1))
        return x_BSNH.transpose(1, 2).contiguous().flatten(0, 1)

    def _dropout(self, x: Tensor) -> Tensor:
        # F.dropout on the CPU keeps a mask as wide as x; this one keeps one byte per element, as on a GPU.
        return torch.native_dropout(x, self.shape.dropout, True)[0]

    def _enter(self, x_TD: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        return (project if self.tp is None else self.tp.project)(x_TD, *weights)

    def _leave(self, partial_TD: Tensor) -> Tensor:
        return partial_TD if self.tp is None else self.tp.leave(partial_TD)


class SavedBytes:
    """Counts what autograd saves within `hooks()`: each storage once, the module's parameters not."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage
        return x

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())
