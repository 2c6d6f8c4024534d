"""The section `dispatch` of schema.py: how rows travel between the ranks of ep. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moesys.config.component_schema import ComponentConfig

Wire = Literal["none", "int8", "int4", "e4m3", "e5m2"]
"""none = in the compute type; the others write each number in eight bits, int4 in four."""

Exchange = Literal["flat", "hierarchical", "deduplicated"]


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """How rows and their gradients are written while they travel, in training; an evaluation's are left as they are."""

    dispatch_forward: Wire = "none"
    """Tokens' rows to the experts."""
    dispatch_backward: Wire = "none"
    """The gradients of these, back."""
    combine_forward: Wire = "none"
    """Experts' results back to the tokens."""
    combine_backward: Wire = "none"
    """The gradients of these, to the experts."""
    block: int = 0
    """Columns that share an fp32 scale, an even number with int4; 0 = the whole row."""
    stochastic_backward: bool = True
    """Gradients are rounded up or down by chance, with the number as the mean; false = to the nearest."""
    error_feedback: bool = False
    """What rounding takes from a gradient's row is given to the next one of the message, 64 rows at a time, to each number at
    most its own step."""

    @property
    def is_used(self) -> bool:
        """Whether anything is written in fewer bits."""
        return set(self.kinds) != {"none"}

    def row_bytes(self, kind: Wire, d_row: int, width: int) -> int:
        """Of a row of `d_row` numbers of `width` bytes, as it travels."""
        if kind == "none":
            return d_row * width
        codes = -(-d_row // 2) if kind == "int4" else d_row
        return codes + 4 * -(-d_row // (self.block or d_row))

    @property
    def kinds(self) -> tuple[Wire, ...]:
        """Of the four ways."""
        return (
            self.dispatch_forward,
            self.dispatch_backward,
            self.combine_forward,
            self.combine_backward,
        )


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """What an MoE layer may take."""

    codec: ComponentConfig | None = None
    """As `dispatch.codec`."""
    wire: WireConfig = field(default_factory=WireConfig)


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """How rows travel."""

    codec: ComponentConfig | None = None
    """A class that lets fewer rows travel than tokens have experts, in training, e.g. moesys.moe.codecs.LshCodec, and its
    options. null = a row for each of a token's experts."""
    wire: WireConfig = field(default_factory=WireConfig)
    exchange: Exchange = "flat"
    """flat = every rank to every other; hierarchical = inside the node, then between the ranks of one place in all nodes;
    deduplicated = a token's row goes to a node once, by such a rail, and is spread there: results are summed before they
    come back."""
    ranks_per_node: int | None = None
    """That are near each other, for an exchange that is not flat. null = those of a node, as launched."""
    warmup_steps: int = 0
    """So many first optimizer steps have neither codec nor wire."""
    candidates: Mapping[str, CandidateConfig] = field(default_factory=dict)
    """In the place of `codec` and `wire`: after the first steps all are tried on a held-out batch, and each MoE layer takes one,
    or none, by `error_budget` or `byte_budget`. {} = none to choose from."""
    error_budget: float | None = None
    """A layer takes the fastest of those with which its output is at most so far from that without, relative."""
    byte_budget: float | None = None
    """All layers together send at most this share of the bytes that they would send without, with the least error."""

    @property
    def codecs(self) -> Mapping[str, ComponentConfig]:
        """All that may be used, by the key that names each."""
        named = {"dispatch.codec": self.codec} | {
            f"dispatch.candidates.{name}.codec": candidate.codec
            for name, candidate in self.candidates.items()
        }
        return {key: codec for key, codec in named.items() if codec is not None}

    @property
    def compresses(self) -> bool:
        """Whether fewer rows, or fewer bits, travel, or may."""
        return self.codec is not None or self.wire.is_used or bool(self.candidates)
