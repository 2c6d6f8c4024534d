"""Small data files for tests: the token format written by hand, and text made of random words."""

import struct
from pathlib import Path

import numpy as np

from moesys.data.indexed import IndexedTokens

CODES = {np.uint8: 1, np.int16: 3, np.int32: 4, np.int64: 5, np.uint16: 8}


def write_tokens(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    """`documents` as PREFIX.bin and PREFIX.idx, one sequence per document."""
    lengths = [len(document) for document in documents]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(lengths), len(lengths) + 1)
    arrays = (
        np.array(lengths, "<i4"),
        starts.astype("<i8"),
        np.arange(len(lengths) + 1, dtype="<i8"),
    )
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())


def stream(folder: Path, num_tokens: int, name: str = "stream") -> IndexedTokens:
    """Tokens 0, 1, 2, ...: a token tells its position."""
    write_tokens(folder / name, [list(range(num_tokens))], np.int32)
    return IndexedTokens(folder / name)


def write_words(folder: Path, num_files: int, words_per_file: int, seed: int = 0) -> None:
    """Text files of invented words, some of them not ASCII."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzäß中🙂"))
    words = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(500)]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_files):
        chosen = random.integers(0, len(words), words_per_file)
        text = " ".join(words[k] for k in chosen) + f"\nfile {index}\n"
        (folder / f"{index:04d}.txt").write_text(text, encoding="utf-8")


class Silent:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.phases: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def phase(self, label: str, total_bytes: int, done_bytes: int = 0) -> None:
        self.phases.append(label)

    def advance(self, count_bytes: int) -> None:
        pass
