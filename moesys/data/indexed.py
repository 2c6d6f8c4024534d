"""Read the Megatron token format (.idx and .bin) by memory map, checked when opened.

The .idx file, little endian, S sequences and D documents:

    byte 0        9 bytes   b"MMIDIDX\\0\\0"
    byte 9        uint64    version, 1
    byte 17       uint8     dtype code of the tokens in .bin
    byte 18       uint64    S
    byte 26       uint64    D + 1
    byte 34       int32[S]  tokens in each sequence
    then          int64[S]  byte offset of each sequence in .bin
    then          int64[D+1] first sequence of each document, closed by S

The .bin file is the tokens of all sequences, end to end. Written by megatron-core's
`IndexedDatasetBuilder`; nothing of megatron is imported here (that takes seconds on every rank).

Shapes: N tokens, S sequences, D documents.
"""

import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from moesys.data.corpus import hash_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CHUNK_ITEMS = 1 << 22
_FINGERPRINT_BLOCKS = 256
_FINGERPRINT_BLOCK_BYTES = 4096


class IndexedTokens:
    """The tokens of `prefix`.bin, described by `prefix`.idx.

    Args:
        prefix: path without the suffix, e.g. data/stdlib/train.
        vocab_size: when given, every token id must lie in [0, vocab_size).
        scan: read all of .bin once to check that, at memory (or disk) speed. False is for a caller
            that has checked these very files before.

    Raises:
        ValueError: a file is missing, truncated, too long or inconsistent, or holds a token id that
            the vocabulary does not; names the file, the byte offset and the fix.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], vocab_size: int | None = None, *, scan: bool = True
    ) -> None:
        self.idx_path = Path(f"{os.fspath(prefix)}.idx")
        self.bin_path = Path(f"{os.fspath(prefix)}.bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise _broken(
                    path, 0, "there is no such file", "run `moesys prep`, or correct the path"
                )
        self._open_index()
        self._check_index()
        self.tokens_N = self._open_tokens()
        """Memory-mapped token ids, read-only, in the dtype of the file."""
        if vocab_size is not None and scan:
            self._check_ids(vocab_size)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.num_tokens

    @property
    def num_documents(self) -> int:
        return self._document_sequences.size - 1

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [D + 1]: first token of each document, closed by the number of tokens."""
        ends_S = np.append(self._pointers_S, self.num_tokens * self.dtype.itemsize)
        return ends_S[self._document_sequences] // self.dtype.itemsize

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the .idx file and of 256 blocks of 4 KiB spread evenly over .bin.

        Tells one dataset from another without reading all of it; not a proof against bit rot.
        """
        digest = xxhash.xxh3_128(hash_file(self.idx_path).encode())
        raw = np.memmap(self.bin_path, mode="r")
        last = max(0, raw.size - _FINGERPRINT_BLOCK_BYTES)
        for start in sorted(
            {last * k // (_FINGERPRINT_BLOCKS - 1) for k in range(_FINGERPRINT_BLOCKS)}
        ):
            digest.update(raw[start : start + _FINGERPRINT_BLOCK_BYTES].tobytes())
        return digest.hexdigest()

    def _open_index(self) -> None:
        path = self.idx_path
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC[: len(header)]):
            raise _broken(
                path, 0, f"must start with {_MAGIC!r}, starts with {header[:9]!r}", _NOT_IDX
            )
        if len(header) < _HEADER.size:
            raise _broken(path, size, f"ends inside its {_HEADER.size}-byte header", _AGAIN)
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1:
            raise _broken(path, 9, f"must be version 1, is version {version}", _NOT_IDX)
        if code not in _DTYPES:
            known = ", ".join(f"{c} ({d.name})" for c, d in _DTYPES.items())
            raise _broken(path, 17, f"token dtype code must be one of {known}, is {code}", _NOT_IDX)
        self.dtype = _DTYPES[code]
        # Python integers: a corrupt count cannot overflow this sum.
        pointers_at = _HEADER.size + 4 * sequences
        documents_at = pointers_at + 8 * sequences
        expected = documents_at + 8 * documents
        if size < expected:
            rule = f"ends here; its header promises {expected} bytes ({sequences} sequences, {documents} document marks)"
            raise _broken(path, size, rule, _AGAIN)
        if size > expected:
            rule = f"holds {size - expected} bytes after the index"
            modes = size == expected + sequences
            fix = (
                "multimodal datasets (one mode byte per sequence) are not read here"
                if modes
                else _AGAIN
            )
            raise _broken(path, expected, rule, fix)
        if sequences == 0 or documents < 2:
            raise _broken(
                path,
                18,
                f"holds {sequences} sequences and {documents} document marks: no text",
                _AGAIN,
            )
        raw = np.memmap(path, mode="r")
        self._pointers_at = pointers_at
        self._documents_at = documents_at
        self._lengths_S = raw[_HEADER.size : pointers_at].view("<i4")
        self._pointers_S = raw[pointers_at:documents_at].view("<i8")
        self._document_sequences = raw[documents_at:expected].view("<i8")

    def _check_index(self) -> None:
        """Lengths >= 0, offsets their running sum, document marks rising from 0 to S; sets num_tokens."""
        path, itemsize = self.idx_path, self.dtype.itemsize
        end_bytes = 0
        for start in range(0, self._lengths_S.size, _CHUNK_ITEMS):
            lengths = self._lengths_S[start : start + _CHUNK_ITEMS].astype(np.int64)
            bad = _first(lengths < 0)
            if bad is not None:
                rule = f"sequence {start + bad} has {lengths[bad]} tokens"
                raise _broken(path, _HEADER.size + 4 * (start + bad), rule, _AGAIN)
            ends = end_bytes + np.cumsum(lengths * itemsize)
            wanted = ends - lengths * itemsize
            given = self._pointers_S[start : start + _CHUNK_ITEMS]
            bad = _first(given != wanted)
            if bad is not None:
                rule = f"sequence {start + bad} must start at byte {wanted[bad]} of .bin (the sum of the lengths before it), says {given[bad]}"
                raise _broken(path, self._pointers_at + 8 * (start + bad), rule, _AGAIN)
            end_bytes = int(ends[-1])
        marks = self._document_sequences
        for start in range(0, marks.size, _CHUNK_ITEMS):
            before = max(0, start - 1)
            chunk = marks[before : start + _CHUNK_ITEMS]
            bad = _first(chunk[1:] < chunk[:-1])
            if bad is not None:
                rule = f"document {before + bad + 1} must not start before document {before + bad}: {chunk[bad + 1]} < {chunk[bad]}"
                raise _broken(path, self._documents_at + 8 * (before + bad + 1), rule, _AGAIN)
        for position, wanted in ((0, 0), (marks.size - 1, self._lengths_S.size)):
            if marks[position] != wanted:
                rule = f"document mark {position} must be {wanted}, is {marks[position]}"
                raise _broken(path, self._documents_at + 8 * position, rule, _AGAIN)
        self.num_tokens = end_bytes // itemsize

    def _open_tokens(self) -> np.memmap:
        size = self.bin_path.stat().st_size
        promised = self.num_tokens * self.dtype.itemsize
        if size < promised:
            rule = f"ends here; {self.idx_path.name} promises {promised} bytes ({self.num_tokens} tokens)"
            raise _broken(self.bin_path, size, rule, _AGAIN)
        if size > promised:
            rule = f"holds {size - promised} bytes more than the {self.num_tokens} tokens of {self.idx_path.name}"
            raise _broken(self.bin_path, promised, rule, _AGAIN)
        if size == 0:
            raise _broken(self.bin_path, 0, "holds no tokens", _AGAIN)
        return np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def _check_ids(self, vocab_size: int) -> None:
        for start in range(0, self.num_tokens, _CHUNK_ITEMS):
            chunk = self.tokens_N[start : start + _CHUNK_ITEMS]
            # Seen as unsigned, a negative id is a huge one: one maximum finds both.
            unsigned = chunk.view(f"<u{self.dtype.itemsize}")
            if unsigned.max() < vocab_size:
                continue
            bad = _first(unsigned >= vocab_size)
            assert bad is not None
            rule = f"token {start + bad} has id {chunk[bad]}, outside a vocabulary of {vocab_size}"
            fix = "use the tokenizer and vocab_size these files were made with"
            raise _broken(self.bin_path, (start + bad) * self.dtype.itemsize, rule, fix)


_AGAIN = "the file is damaged; make it again with `moesys prep`, or copy it again"
_NOT_IDX = "this is not a Megatron .idx file that can be read here"


def _first(bad: np.ndarray) -> int | None:
    """Position of the first True."""
    position = int(bad.argmax()) if bad.size else 0
    return position if bad.size and bad[position] else None


def _broken(path: Path, offset_bytes: int, rule: str, fix: str) -> ValueError:
    return ValueError(f"{path}: byte {offset_bytes}: {rule}: {fix}")
