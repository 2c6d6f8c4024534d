"""The decoder: pre-norm blocks of attention and a feed-forward, dense in the first layers, MoE in the rest.

Single-device code: no process groups. Shapes: B sequences, S positions, T = B * S tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.models.attention import Attention
from moesys.models.linear import Embedding, Linear
from moesys.models.norm import RMSNorm
from moesys.models.rope import rope_tables
from moesys.moe.balance import RoutingLosses
from moesys.moe.experts import SwiGLU
from moesys.moe.layer import MoELayer
from moesys.ops.cross_entropy import cross_entropy_sum


def all_positions(seq_len: int, device: torch.device) -> Tensor:
    """The place in its sequence of each of this rank's S positions, int64 [S]: all of them."""
    return torch.arange(seq_len, device=device)


class DenseBlock(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ffn)

    def forward(self, x_TD: Tensor, rope_SH: tuple[Tensor, Tensor]) -> Tensor:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rope_SH)
        return x_TD + self.ffn(self.ffn_norm(x_TD))


class MoEBlock(nn.Module):
    """x + attention(norm x), then x + MoE(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoELayer(config.moe, config.d_model)

    def forward(
        self, x_TD: Tensor, rope_SH: tuple[Tensor, Tensor], state: Tensor | None
    ) -> tuple[Tensor, RoutingLosses, Tensor | None]:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rope_SH)
        y_TD, losses, state = self.moe(self.ffn_norm(x_TD), state, rope_SH[0].shape[0])
        return x_TD + y_TD, losses, state


class Transformer(nn.Module):
    """A decoder, or a pipeline stage of one: some of its layers, the embedding with the first, the head with the last.

    Names and weights are those of the whole decoder. Build it under `torch.device("meta")`;
    `parallelize.build_model` gives it shards and weights.
    """

    def __init__(self, config: ModelConfig, layers: Iterable[int] | None = None) -> None:
        super().__init__()
        self.config = config
        indices = range(config.num_layers) if layers is None else list(layers)
        is_first, is_last = 0 in indices, config.num_layers - 1 in indices
        self.embed = Embedding(config.vocab_size, config.d_model) if is_first else None
        self.layers = nn.ModuleDict(
            {
                str(i): DenseBlock(config) if i < config.num_dense_layers else MoEBlock(config)
                for i in indices
            }
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps) if is_last else None
        self.head = Linear(config.d_model, config.vocab_size) if is_last else None
        self.cross_entropy_sum: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum
        self.positions: Callable[[int, torch.device], Tensor] = all_positions
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter, if the configuration says so; again after `to_empty`."""
        if self.config.tie_embeddings and self.head is not None and self.embed is not None:
            self.head.weight = self.embed.weight

    def forward(
        self,
        x: Tensor,
        seq_len: int | None = None,
        losses: RoutingLosses | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, RoutingLosses, Tensor | None]:
        """From token ids [B, S], or what the stage before returned, to hidden states [T, D] (by the last stage, logits
        [T, V] in fp32), the routing losses summed over layers, and the last router's state.

        A stage without the embedding must be told `seq_len` = S.
        """
        seq_len = x.shape[-1] if seq_len is None else seq_len
        rope_SH = rope_tables(
            self.positions(seq_len, x.device), self.config.resolved_head_dim, self.config.rope_theta
        )
        x_TD = x if self.embed is None else self.embed(x.flatten())
        zero = torch.zeros((), device=x_TD.device)
        total = RoutingLosses(zero, zero, zero) if losses is None else losses
        for block in self.blocks():
            if isinstance(block, MoEBlock):
                x_TD, block_losses, state = block(x_TD, rope_SH, state)
                total = total + block_losses
            else:
                x_TD = block(x_TD, rope_SH)
        if self.norm is None or self.head is None:
            return x_TD, total, state
        return self.head(self.norm(x_TD)).float(), total, state

    def logits(self, input_ids_BS: Tensor) -> Tensor:
        """[B, S, V] in fp32, where no axis but those of data and experts cuts the model."""
        return self(input_ids_BS)[0].unflatten(0, input_ids_BS.shape)

    def loss_sum(self, input_ids_BS: Tensor, target_ids_BS: Tensor) -> tuple[Tensor, RoutingLosses]:
        """Cross-entropy in nats summed over targets (fp32; a target of -100 does not count), and routing losses."""
        logits_TV, losses, _ = self(input_ids_BS)
        return self.cross_entropy_sum(logits_TV, target_ids_BS.flatten()), losses

    def blocks(self) -> list[DenseBlock | MoEBlock]:
        """The blocks from first to last."""
        return [block for block in self.layers.values() if isinstance(block, DenseBlock | MoEBlock)]

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers from first to last."""
        return [block.moe for block in self.blocks() if isinstance(block, MoEBlock)]

    def router_parameters(self) -> int | None:
        """Parameters of one layer's router; None without MoE layers."""
        layers = self.moe_layers()
        return sum(p.numel() for p in layers[0].router.parameters()) if layers else None
