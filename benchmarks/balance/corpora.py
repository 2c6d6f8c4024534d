"""Documents of wanted lengths, cut from a text that is there: what a run reads as any prepared folder.

Shapes: D documents.
"""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from moesys.data.corpus import hash_file
from moesys.data.indexed import IndexedTokens
from moesys.data.manifest import FILE, DataManifest
from moesys.data.sequences import find_sequences
from moesys.plan.batch.lengths import cut, first
from moesys.plan.placement import Integers

Lengths = Callable[[int, int], Integers]
"""Of sequences with at most so many tokens together, the longest of at most so many."""
LONG = 8
"""A sequence is long with more than the longest over this: 256 Ki of 2 Mi tokens (ByteScale, 2502.21231, section 7)."""


def heavy_tail(tokens: int, longest: int, *, long_share: float) -> Integers:
    """Short ones are lognormal; so large a share of tokens lies in long ones, whose number falls with their length."""
    rng = np.random.default_rng(0)
    least = longest / LONG
    long_D = least * LONG ** rng.random(4096)
    long_D = long_D.astype(np.int64)
    wanted = tokens * long_share
    long_D = long_D[: int(np.abs(np.cumsum(long_D) - wanted).argmin()) + 1]
    short_D = rng.lognormal(np.log(longest / 64), 0.8, 1 << 16).clip(16, least).astype(np.int64)
    short_D = first(short_D, tokens - int(long_D.sum()))
    return rng.permutation(np.concatenate([long_D, short_D]))


def uniform_short(tokens: int, longest: int) -> Integers:
    """Between half and once a sixteenth of the longest."""
    lengths = np.random.default_rng(0).integers(longest // 32, longest // 16, 1 << 16)
    return first(lengths, tokens)


def one_giant(tokens: int, longest: int) -> Integers:
    """One of the longest in about four times as many tokens, all others short."""
    short_D = uniform_short(3 * longest, longest)
    each = np.concatenate([[longest], short_D])
    return first(np.tile(each, -(-tokens // int(each.sum()))), tokens)


def of_data(folder: Path, tokens: int, longest: int) -> Integers:
    """Of the documents that are there, in any order, cut as a run cuts them."""
    found = find_sequences(IndexedTokens(folder / "train"), longest)
    lengths = np.random.default_rng(0).permutation(found.inputs_D[found.inputs_D > 0])
    return first(cut(lengths, longest), tokens)


def corpora(real: Path) -> dict[str, Lengths]:
    """`real`: a prepared folder of the standard library's files."""
    return {
        "standard library": partial(of_data, real),
        "heavy tail, 9.8 % long": partial(heavy_tail, long_share=0.098),
        "heavy tail, 37 % long": partial(heavy_tail, long_share=0.37),
        "uniform short": uniform_short,
        "one giant": one_giant,
    }


def write_corpus(folder: Path, text: Path, lengths_D: Integers) -> Path:
    """`text`, a prepared folder, with documents that have so many inputs each, in order; its text again and again."""
    shutil.copytree(text, folder)
    source = IndexedTokens(text / "train")
    tokens_D = lengths_D + 1
    number = int(tokens_D.sum())
    tokens_N = np.resize(np.asarray(source.tokens_N), number)
    tokens_N.tofile(folder / "train.bin")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(tokens_D), len(tokens_D) + 1)
    assert source.dtype == np.dtype("<u2"), "code 8"
    starts_D = (np.cumsum(tokens_D) - tokens_D) * source.dtype.itemsize
    arrays = (
        tokens_D.astype("<i4"),
        starts_D.astype("<i8"),
        np.arange(len(tokens_D) + 1).astype("<i8"),
    )
    (folder / "train.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    manifest = DataManifest.load(text)
    split = manifest.splits["train"]
    changed = replace(
        split,
        documents=len(tokens_D),
        tokens=number,
        bytes=max(1, round(number * split.bytes / split.tokens)),
        bin_bytes=(folder / "train.bin").stat().st_size,
        xxh3_bin=hash_file(folder / "train.bin"),
        xxh3_idx=hash_file(folder / "train.idx"),
    )
    splits: Mapping[str, object] = {**manifest.splits, "train": changed}
    manifest = replace(manifest, splits=splits)  # pyright: ignore
    (folder / FILE).write_text(json.dumps(manifest.to_json()) + "\n")
    return folder
