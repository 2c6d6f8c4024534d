"""The decoder: pre-norm blocks of attention and a feed-forward, dense in the first layers, MoE in the rest, or memory.

Single-device code: no process groups. Shapes: B sequences, S positions, T = B * S tokens, D model, V vocabulary,
N targets ahead of a token (1, and one for each depth of multi-token prediction).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from moesys.config.schema import ModelConfig
from moesys.models.attention import Attention, Within
from moesys.models.linear import Embedding, Linear
from moesys.models.memory_layer import MemoryLayer
from moesys.models.mtp import MTPJoin, Together
from moesys.models.norm import RMSNorm
from moesys.models.rope import rope_tables
from moesys.moe.balance import RoutingLosses
from moesys.moe.component import build_router
from moesys.moe.experts import SwiGLU
from moesys.moe.layer import MoELayer
from moesys.moe.tokens import Known
from moesys.ops.cross_entropy import cross_entropy_sum
from moesys.parallel.context import document_ends
from moesys.plan.batch.local import LocalPieces


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

    def forward(
        self, x_TD: Tensor, rope_SH: tuple[Tensor, Tensor], within: Within | None = None
    ) -> Tensor:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rope_SH, within)
        return x_TD + self.ffn(self.ffn_norm(x_TD))


class MemoryBlock(DenseBlock):
    """x + attention(norm x), then x + SwiGLU(norm x) + memory(norm x) (UltraMemV2, 2508.18756)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.memory = MemoryLayer(config)

    def forward(
        self, x_TD: Tensor, rope_SH: tuple[Tensor, Tensor], within: Within | None = None
    ) -> Tensor:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rope_SH, within)
        normed_TD = self.ffn_norm(x_TD)
        # First: a recomputation then ends before the feed-forward's sum.
        read_TD = self.memory(normed_TD, within if isinstance(within, LocalPieces) else None)
        return x_TD + self.ffn(normed_TD) + read_TD


class MoEBlock(nn.Module):
    """x + attention(norm x), then x + MoE(norm x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        place, moe = config.moe_layers.index(layer), config.moe_of(layer)
        self.moe = MoELayer(moe, config.d_model, place, len(config.moe_layers))

    def forward(
        self,
        x_TD: Tensor,
        rope_SH: tuple[Tensor, Tensor],
        within: Within | None = None,
        state: Tensor | None = None,
        known: Known | None = None,
    ) -> tuple[Tensor, RoutingLosses, Tensor | None]:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rope_SH, within)
        y_TD, losses, state = self.moe(self.ffn_norm(x_TD), state, rope_SH[0].shape[0], known)
        return x_TD + y_TD, losses, state


class Transformer(nn.Module):
    """A decoder, or a pipeline stage of one: some of its layers, the embedding with the first, the head with the last.

    Names and weights are those of the whole decoder. Build it under `torch.device("meta")`;
    `parallelize.build_model` gives it shards and weights.
    """

    def __init__(self, config: ModelConfig, layers: Iterable[int] | None = None) -> None:
        super().__init__()
        self.config = config
        indices = range(config.total_layers) if layers is None else list(layers)
        self.is_first, is_last = 0 in indices, config.num_layers - 1 in indices
        # A last stage may have a copy of the table, for a tied head or for what it embeds itself.
        has_table = self.is_first or (is_last and config.has_two_tables)
        self.embed = Embedding(config.vocab_size, config.d_model) if has_table else None
        self.layers = nn.ModuleDict({str(i): _block(config, i) for i in indices})
        ahead = [i for i in indices if i >= config.num_layers]
        self.mtp = nn.ModuleDict({str(i): MTPJoin(config.d_model, config.norm_eps) for i in ahead})
        """What multi-token prediction has beside its layers, by layer."""
        self.over_depth = nn.ModuleDict()
        """What all layers have one of. Every stage has it, and all stages the same."""
        for name, module in self._modules_over_depth().items():
            self.share_over_depth(name, module)
        self.norm = RMSNorm(config.d_model, config.norm_eps) if is_last else None
        self.head = Linear(config.d_model, config.vocab_size) if is_last else None
        self.cross_entropy_sum: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum
        self.positions: Callable[[int, torch.device], Tensor] = all_positions
        self.seq_len: int | None = None
        """S, which only the first stage sees from its input."""
        self.state_shape: tuple[int, int] | None = None
        """Tokens, and numbers per token, of what routers hand on from layer to layer; None where no stage's end cuts it."""
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter, if the configuration says so; again after `to_empty`."""
        if self.config.tie_embeddings and self.head is not None and self.embed is not None:
            self.head.weight = self.embed.weight

    def _modules_over_depth(self) -> Mapping[str, nn.Module]:
        """With `share_depth` an MoE layer and an attention that nothing runs: every layer borrows what is in them. Else
        what the routers share."""
        config = self.config
        if not config.moe_layers:
            return {}
        if config.share_depth != "none":
            block = MoEBlock(config, config.moe_layers[0])
            attn = {"attn": block.attn} if config.share_depth == "all" else {}
            return {"moe": block.moe, **attn}
        if routers := [layer.router for layer in self.moe_layers()]:
            router = routers[0]
        else:
            moe = config.moe_of(config.moe_layers[0])
            router = build_router(moe, config.d_model, 0, len(config.moe_layers))
        return {name: router.get_submodule(name) for name in getattr(router, "over_depth", ())}

    def share_over_depth(self, name: str, module: nn.Module) -> None:
        """Let every MoE layer of this stage use `module`, or what is in it, in the place of its own."""
        self.over_depth[name] = module
        for block in self.blocks():
            if not isinstance(block, MoEBlock):
                continue
            if isinstance(module, Attention | MoELayer):
                for part, shared in module.named_children():
                    _borrow(getattr(block, name), part, shared)
            else:
                _borrow(block.moe.router, name, module)

    def forward(
        self,
        x: Tensor,
        losses_3: Tensor | None = None,
        state: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        pieces: LocalPieces | None = None,
        ids_BS: Tensor | None = None,
        places_BS: Tensor | None = None,
        targets_BSN: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """From token ids [B, S], or what the stage before returned, to what the next stage takes.

        `documents` (integers on the CPU) says which document each token of the whole sequences belongs to: attention
        then stays inside it. `pieces` of sequences, in their place, are what this rank has: T tokens as one sample. A stage but the first is told the token ids as `ids_BS`, and in training all stages the tokens' places in the step as `places_BS`, for routers that ask.
        `targets_BSN` (`models.mtp.targets_ahead`) asks the last stage for multi-token prediction.

        Returns hidden states [T, D] (the last stage: logits [T, V] in fp32), the RoutingLosses summed over layers so
        far as one fp32 tensor, and with a `state_shape` the last router's state (zeros before the first router). The
        last stage returns no state, but after the losses the logits [T, V] of each depth of multi-token prediction.
        Raises ValueError for a router whose state is not as wide as its `state_dim` says.
        """
        if self.is_first:
            assert self.embed is not None
            self.seq_len = x.shape[-1]
            ids_BS = x
            x = self.embed(x.flatten())
        rope_SH = rope_tables(
            self._positions(pieces, x.device),
            self.config.resolved_head_dim,
            self.config.rope_theta,
        )
        if losses_3 is None:
            # A leaf with a gradient, so that what a stage sends on always has one.
            losses_3 = torch.zeros(3, device=x.device, requires_grad=torch.is_grad_enabled())
        if state is not None:
            received: Tensor = _Received.apply(state)
            if self._follows_router:
                state = received
            else:  # It fills the place of a state. What was sent must get a gradient back, so it is read.
                losses_3, state = losses_3 + 0.0 * received.sum(), None
        losses = RoutingLosses(*losses_3.unbind())
        within = pieces if documents is None else document_ends(documents.tolist())
        ids_U, places_U = (None if x is None else x.flatten() for x in (ids_BS, places_BS))
        known = Known(ids_U, places_U, pieces)
        for layer, block in self.layers.items():
            if layer not in self.mtp:
                x, losses, state = _pass(block, x, losses, rope_SH, within, state, known)
        if self.norm is not None and self.head is not None:
            x = self.norm(x)
            logits = [self.head(x).float()]
            if targets_BSN is not None and self.mtp:
                assert self.embed is not None, "the last stage has the table"
                ids_NU = targets_BSN.flatten(0, 1).T.clamp(min=0)  # where nothing is, 0
                embedded = [self.embed(ids_U) for ids_U in ids_NU[:-1]]
                embedded_NTD, x = Together.apply(torch.stack(embedded), x)
                for depth, (layer, join) in enumerate(self.mtp.items()):
                    assert isinstance(join, MTPJoin)
                    known = Known(ids_NU[depth], places_U, pieces)
                    x = join(embedded_NTD[depth], x)
                    block = self.layers[layer]
                    x, losses, state = _pass(block, x, losses, rope_SH, within, state, known)
                    x = join.norm(x)
                    logits.append(self.head(x).float())
            return logits[0], torch.stack(losses), *logits[1:]
        self._check_state(state)
        if self.state_shape is None:
            return x, torch.stack(losses)
        if state is None:  # no router yet
            state = x.new_zeros(self.state_shape, requires_grad=losses_3.requires_grad)
        # A copy: a split backward detaches what a stage sends, which what made the state may have saved.
        return x, torch.stack(losses), state.clone()

    def _positions(self, pieces: LocalPieces | None, device: torch.device) -> Tensor:
        """int64 [S]: of what one sample has on this rank."""
        if pieces is not None:
            return torch.from_numpy(pieces.positions_T()).to(device)
        assert self.seq_len is not None, "a stage but the first is told seq_len"
        return self.positions(self.seq_len, device)

    @property
    def _follows_router(self) -> bool:
        """Whether a layer before this stage has a router."""
        return any(layer < min(map(int, self.layers)) for layer in self.config.moe_layers)

    def _check_state(self, state: Tensor | None) -> None:
        """What crosses a stage's end travels in the shape that both sides were told."""
        if state is not None and tuple(state.shape) != self.state_shape:
            router = self.config.moe.router.target
            wide = 0 if self.state_shape is None else self.state_shape[1]
            raise ValueError(
                f"model.moe.router._target_={router}: its state {list(state.shape)} must be [tokens, state_dim], to "
                f"cross a pipeline stage's end, and its state_dim is {wide}: write state_dim = {state.shape[-1]} in "
                "the class, or use parallel.pp=1"
            )

    def logits(self, input_ids_BS: Tensor) -> Tensor:
        """[B, S, V] in fp32, where no axis but those of data and experts cuts the model."""
        return self(input_ids_BS)[0].unflatten(0, input_ids_BS.shape)

    def loss_sum(self, input_ids_BS: Tensor, target_ids_BS: Tensor) -> tuple[Tensor, RoutingLosses]:
        """Cross-entropy in nats summed over targets (fp32; a target of -100 does not count), and routing losses.

        Without multi-token prediction.
        """
        logits_TV, losses_3 = self(input_ids_BS)
        loss_sum = self.cross_entropy_sum(logits_TV, target_ids_BS.flatten())
        return loss_sum, RoutingLosses(*losses_3.unbind())

    def blocks(self) -> list[DenseBlock | MoEBlock]:
        """The blocks from first to last."""
        return [block for block in self.layers.values() if isinstance(block, DenseBlock | MoEBlock)]

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers from first to last."""
        return [block.moe for block in self.blocks() if isinstance(block, MoEBlock)]

    def moe_places(self) -> dict[int, MoELayer]:
        """The MoE layers by their place among those of all stages."""
        return {
            self.config.moe_layers.index(int(index)): block.moe
            for index, block in self.layers.items()
            if isinstance(block, MoEBlock)
        }

    def decoder_moe_layers(self) -> list[MoELayer]:
        """Those that a forward without multi-token prediction runs."""
        layers = self.moe_layers()
        return layers[: len(layers) - len(self.mtp)]

    def router_parameters(self) -> list[int]:
        """Parameters that the router of each MoE layer works with, those common to all included."""
        common = [*self.over_depth.values()] if self.config.share_depth == "none" else []
        return [
            sum(p.numel() for module in (layer.router, *common) for p in module.parameters())
            for layer in self.moe_layers()
        ]


def _block(config: ModelConfig, layer: int) -> DenseBlock | MoEBlock:
    if layer in config.moe_layers:
        return MoEBlock(config, layer)
    return MemoryBlock(config) if layer in config.memory_layers.layers else DenseBlock(config)


M = TypeVar("M", bound=nn.Module)


def modules_of(model: nn.Module, kind: type[M]) -> list[M]:
    """Those of a kind, once each: with `share_depth` also the one that layers borrow from, which nothing runs."""
    return [module for module in model.modules() if isinstance(module, kind)]


def _borrow(user: nn.Module, name: str, module: nn.Module) -> None:
    """Let `user` have `module` as `name` without its being one of its modules."""
    user._modules.pop(name, None)
    user.__dict__[name] = module


def _pass(
    block: nn.Module,
    x_TD: Tensor,
    losses: RoutingLosses,
    rope_SH: tuple[Tensor, Tensor],
    within: Within | None,
    state: Tensor | None,
    known: Known,
) -> tuple[Tensor, RoutingLosses, Tensor | None]:
    """Through one block: x, the losses with its own, the state that it hands on."""
    if not isinstance(block, MoEBlock):
        return block(x_TD, rope_SH, within), losses, state
    x_TD, of_block, state = block(x_TD, rope_SH, within, state, known)
    return x_TD, losses + of_block, state


class _Received(torch.autograd.Function):
    """The identity; its gradient is contiguous, as what goes to another stage must be."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad.contiguous()
