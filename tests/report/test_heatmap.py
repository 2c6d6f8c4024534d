"""The pixels of a heat map, read back."""

import base64
import zlib

import numpy as np

from moesys.report.heatmap import OVER_MEAN


def test_heat_map_pixels_are_the_loads() -> None:
    relative = np.array([[0.0, 0.25, 0.5], [1.0, 2.0, 9.0]])
    width, height, palette, index = decode_png(OVER_MEAN.png_data_uri(relative))
    assert (width, height) == (3, 2)
    assert index.tolist() == [
        [0, 1, 9],
        [17, 25, 33],
    ]  # black, then 33 levels of log2 from 1/4 to 4
    assert palette[0] == (0, 0, 0)
    lightness = [0.3 * r + 0.6 * g + 0.1 * b for r, g, b in palette[1:]]
    assert lightness[:17] == sorted(
        lightness[:17]
    )  # readable without colour: light in the middle only
    assert lightness[16:] == sorted(lightness[16:], reverse=True)


def decode_png(uri: str) -> tuple[int, int, list[tuple[int, ...]], np.ndarray]:
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(data[at + 8 + size : at + 12 + size])
        chunks[body[:4]], at = body[4:], at + 12 + size
    width, height = int.from_bytes(chunks[b"IHDR"][:4]), int.from_bytes(chunks[b"IHDR"][4:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    palette = [tuple(chunks[b"PLTE"][i : i + 3]) for i in range(0, len(chunks[b"PLTE"]), 3)]
    return width, height, palette, rows[:, 1:]
