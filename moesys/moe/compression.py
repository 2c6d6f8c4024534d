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
    def of(cls, config: WireConfig) -> "WireFormats":
        """As a configuration says."""

        def format(kind: Wire, is_stochastic: bool) -> WireFormat | None:
            if kind == "none":
                return None
            return WireFormat(
                kind=kind,
                block=config.block,
                is_stochastic=is_stochastic,
                hands_on=config.error_feedback,
            )

        by_chance = config.stochastic_backward
        return cls(
            dispatch=RowFormats(
                forward=format(config.dispatch_forward, False),
                backward=format(config.dispatch_backward, by_chance),
            ),
            combine=RowFormats(
                forward=format(config.combine_forward, False),
                backward=format(config.combine_backward, by_chance),
            ),
        )


PLAIN = WireFormats()


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Of one layer."""

    codec: Codec | None = None
    """None = a row for each slot."""
    formats: WireFormats = PLAIN
    """Of rows between ranks."""


UNCOMPRESSED = Compression()
