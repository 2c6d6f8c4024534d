"""The decoder: pre-norm blocks of attention and a feed-forward, dense in the first layers, MoE in the rest.

Single-device code: no process groups. Shapes: B sequences, S positions, D model, V vocabulary.
"""

import torch
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.models.attention import Attention
from moesys.models.norm import RMSNorm
from moesys.models.rope import rope_tables
from moesys.moe.balance import RoutingLosses
from moesys.moe.experts import SwiGLU
from moesys.moe.layer import MoELayer
from moesys.ops.cross_entropy import cross_entropy_sum


class DenseBlock(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ffn)

    def forward(self, x_BSD: Tensor, rope_SH: tuple[Tensor, Tensor]) -> Tensor:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), rope_SH)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class MoEBlock(nn.Module):
    """x + attention(norm x), then x + MoE(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoELayer(config.moe, config.d_model)

    def forward(
        self, x_BSD: Tensor, rope_SH: tuple[Tensor, Tensor], state: Tensor | None
    ) -> tuple[Tensor, RoutingLosses, Tensor | None]:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), rope_SH)
        y_BSD, losses, state = self.moe(self.ffn_norm(x_BSD), state)
        return x_BSD + y_BSD, losses, state


class Transformer(nn.Module):
    """Build it under `torch.device("meta")`; `parallelize.build_model` gives it shards and weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            DenseBlock(config) if i < config.num_dense_layers else MoEBlock(config)
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter, if the configuration says so; again after `to_empty`."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, input_ids_BS: Tensor) -> tuple[Tensor, RoutingLosses]:
        """Return the last hidden states (normed, [B, S, D]) and the routing losses summed over layers."""
        x_BSD = self.embed(input_ids_BS)
        rope_SH = rope_tables(
            input_ids_BS.shape[1],
            self.config.resolved_head_dim,
            self.config.rope_theta,
            x_BSD.device,
        )
        zero = torch.zeros((), device=x_BSD.device)
        losses, state = RoutingLosses(zero, zero, zero), None
        for layer in self.layers:
            if isinstance(layer, MoEBlock):
                x_BSD, layer_losses, state = layer(x_BSD, rope_SH, state)
                losses = losses + layer_losses
            else:
                x_BSD = layer(x_BSD, rope_SH)
        return self.norm(x_BSD), losses

    def logits(self, input_ids_BS: Tensor) -> Tensor:
        """[B, S, V]."""
        return self.head(self(input_ids_BS)[0])

    def loss_sum(self, input_ids_BS: Tensor, target_ids_BS: Tensor) -> tuple[Tensor, RoutingLosses]:
        """Cross-entropy in nats summed over targets (fp32; a target of -100 does not count), and routing losses."""
        hidden_BSD, losses = self(input_ids_BS)
        logits_TV = self.head(hidden_BSD).flatten(0, 1).float()
        return cross_entropy_sum(logits_TV, target_ids_BS.flatten()), losses

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers from first to last."""
        return [layer.moe for layer in self.layers if isinstance(layer, MoEBlock)]

    def router_parameters(self) -> int | None:
        """Parameters of one layer's router; None without MoE layers."""
        layers = self.moe_layers()
        return sum(p.numel() for p in layers[0].router.parameters()) if layers else None
