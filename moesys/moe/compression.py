"""What an MoE layer does to its rows for fewer bytes: fewer of them, and fewer bits."""

from dataclasses import dataclass

from moesys.config.dispatch_schema import Wire, WireConfig
from moesys.moe.codec import Codec
from moesys.ops.wire import WireFormat
from moesys.parallel.exchange import UNCHANGED, RowFormats


@dataclass(frozen=True, kw_only=True)
class WireFormats:
    """How rows are written on their ways between ranks."""

    dispatch: RowFormats = UNCHANGED
    combine: RowFormats = UNCHANGED

    @classmethod
    def of(cls, config: WireConfig, is_checked: bool = True) -> "WireFormats":
        """As a configuration says; `is_checked`: rows that are not finite are an error."""

        def ways(forward: Wire, backward: Wire) -> RowFormats:
            return RowFormats(
                forward=format(forward),
                backward=format(
                    backward,
                    is_stochastic=config.stochastic_backward,
                    hands_on=config.error_feedback,
                ),
            )

        def format(kind: Wire, **rounding: bool) -> WireFormat | None:
            if kind == "none":
                return None
            return WireFormat(kind=kind, block=config.block, is_checked=is_checked, **rounding)

        return cls(
            dispatch=ways(config.dispatch_forward, config.dispatch_backward),
            combine=ways(config.combine_forward, config.combine_backward),
        )

    @property
    def forward_changes(self) -> bool:
        """Whether rows, and not their gradients alone, are written in few bits."""
        return any(ways.forward is not None for ways in (self.dispatch, self.combine))

    def row_bytes(self, d: int, width: int) -> tuple[int, int]:
        """Of a row of `d` numbers of `width` bytes, there and back: in forward, and in backward."""

        def bytes_of(*formats: WireFormat | None) -> int:
            return sum(d * width if one is None else one.row_bytes(d) for one in formats)

        forward = bytes_of(self.dispatch.forward, self.combine.forward)
        return forward, bytes_of(self.dispatch.backward, self.combine.backward)


PLAIN = WireFormats()


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Of one layer."""

    codec: Codec | None = None
    """None = a row for each slot."""
    formats: WireFormats = PLAIN
    """Of rows between ranks."""
    is_checked: bool = True
    """Tokens that are not finite are an error; otherwise they share rows as zeros would, which they make not finite."""

    @property
    def changes(self) -> bool:
        """Whether the layer's output is another."""
        return self.codec is not None or self.formats.forward_changes


UNCOMPRESSED = Compression()
