"""Heat maps as small palette PNGs, written by hand: the format is a header, a palette, and deflate.

Colour follows the logarithm of a value. Black = 0; see-through (NaN) = no such expert. Every scale is one of lightness too,
so that it reads without colour vision.
"""

import base64
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DEAD = 0
_LEVELS = 33
_ABSENT = 1 + _LEVELS


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Colours of values from `low` to `high`; what is beyond has the end's colour."""

    low: float
    high: float
    anchors: tuple[tuple[float, int, int, int], ...]
    """Position from 0 = low to 1 = high, red, green, blue."""

    def png_data_uri(self, values: NDArray[np.float64]) -> str:
        """`values` (float64 [rows, columns]) as a data: URI, one pixel per cell, row 0 on top."""
        png = _png(self._indices(values), self._palette())
        return "data:image/png;base64," + base64.b64encode(png).decode()

    def cell_colours(self, value: float) -> tuple[str, str]:
        """Background and readable text colour for one value, as CSS."""
        index = int(self._indices(np.array([value]))[0])
        red, green, blue = self._palette()[3 * index : 3 * index + 3]
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
        return f"rgb({red} {green} {blue})", "#111" if light else "#fff"

    @property
    def gradient(self) -> str:
        """The colours as a CSS gradient, low to high."""
        stops = (f"rgb({r} {g} {b}) {position:.0%}" for position, r, g, b in self.anchors)
        return f"linear-gradient(to right, {', '.join(stops)})"

    def _indices(self, values: NDArray[np.float64]) -> NDArray[np.uint8]:
        low, high = np.log2([self.low, self.high])
        with np.errstate(divide="ignore"):
            log2 = np.log2(np.nan_to_num(values))
        position = (np.clip(log2, low, high) - low) / (high - low)
        level = 1 + np.rint(position * (_LEVELS - 1))
        index = np.where(np.nan_to_num(values) > 0, level, _DEAD)
        return np.where(np.isnan(values), _ABSENT, index).astype(np.uint8)

    def _palette(self) -> bytes:
        positions, *channels = zip(*self.anchors, strict=True)
        at = np.linspace(0, 1, _LEVELS)
        rgb = np.stack([np.interp(at, positions, channel) for channel in channels], axis=1)
        return bytes([0, 0, 0]) + np.rint(rgb).astype(np.uint8).tobytes() + bytes([0, 0, 0])


OVER_MEAN = Scale(
    low=1 / 4,
    high=4.0,
    anchors=(
        (0.0, 0x0B, 0x3C, 0x7D),
        (0.25, 0x4B, 0x8C, 0xC8),
        (0.5, 0xEC, 0xEC, 0xEA),
        (0.75, 0xF0, 0x93, 0x2B),
        (1.0, 0x8C, 0x2D, 0x04),
    ),
)
"""Blue = fewer tokens than the mean, grey = the mean, orange = more."""


def from_one_to(most: int) -> Scale:
    """Of counts: grey = 1, darker and greener = more."""
    return Scale(
        low=1.0,
        high=float(max(2, most)),
        anchors=((0.0, 0xEC, 0xEC, 0xEA), (0.5, 0x3F, 0xA6, 0x8E), (1.0, 0x00, 0x41, 0x32)),
    )


def _png(index: NDArray[np.uint8], palette: bytes) -> bytes:
    rows, columns = index.shape
    # Each row starts with its filter; 0 = none, which is best for a palette.
    raw = np.concatenate([np.zeros((rows, 1), np.uint8), index], axis=1).tobytes()
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0))
        + _chunk(b"PLTE", palette)
        + _chunk(b"tRNS", bytes([255]) * _ABSENT + bytes([0]))
        + _chunk(b"IDAT", zlib.compress(raw, 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
