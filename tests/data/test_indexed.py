"""Every way in which a .bin/.idx pair can be broken is refused at open, with the file and the byte."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesys.data.indexed import IndexedTokens
from tests.data.files import write_tokens

# Three documents of 4, 1 and 3 uint16 tokens: .bin has 16 bytes; .idx has 34 + 12 + 24 + 32 = 102.
DOCUMENTS = [[5, 6, 7, 0], [0], [8, 9, 0]]
LENGTHS_AT, POINTERS_AT, MARKS_AT, IDX_END = 34, 46, 70, 102


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens", DOCUMENTS)
    return tmp_path / "tokens"


def put(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def grow(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def test_reads_tokens_and_documents(prefix: Path) -> None:
    tokens = IndexedTokens(prefix, vocab_size=10)
    assert tokens.tokens_N.tolist() == [5, 6, 7, 0, 0, 8, 9, 0]
    assert tokens.tokens_N.dtype == np.uint16
    assert len(tokens) == 8
    assert tokens.num_documents == 3
    assert tokens.document_offsets.tolist() == [0, 4, 5, 8]
    with pytest.raises(ValueError, match="read-only"):
        tokens.tokens_N[0] = 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_reads_every_integer_type(tmp_path: Path, dtype: type) -> None:
    write_tokens(tmp_path / "t", DOCUMENTS, dtype)
    tokens = IndexedTokens(tmp_path / "t", vocab_size=10)
    assert tokens.tokens_N.dtype == dtype
    assert tokens.tokens_N.tolist() == [5, 6, 7, 0, 0, 8, 9, 0]


BROKEN: dict[str, tuple[str, Callable[[Path], None], int, str]] = {
    "idx missing": ("idx", Path.unlink, 0, "no such file"),
    "bin missing": ("bin", Path.unlink, 0, "no such file"),
    "idx empty": ("idx", lambda p: cut(p, 0), 0, "ends inside its 34-byte header"),
    "idx cut in magic": ("idx", lambda p: cut(p, 5), 5, "ends inside its 34-byte header"),
    "idx cut in header": ("idx", lambda p: cut(p, 33), 33, "ends inside its 34-byte header"),
    "idx cut after header": ("idx", lambda p: cut(p, 34), 34, "promises 102 bytes"),
    "idx cut in lengths": ("idx", lambda p: cut(p, 41), 41, "promises 102 bytes"),
    "idx cut in offsets": ("idx", lambda p: cut(p, 60), 60, "promises 102 bytes"),
    "idx one byte short": ("idx", lambda p: cut(p, IDX_END - 1), 101, "promises 102 bytes"),
    "idx one byte long": ("idx", lambda p: grow(p, b"x"), IDX_END, "1 bytes after the index"),
    "idx multimodal": ("idx", lambda p: grow(p, b"\0\0\0"), IDX_END, "multimodal"),
    "magic": ("idx", lambda p: put(p, 0, b"PK"), 0, "must start with"),
    "version": ("idx", lambda p: put(p, 9, b"\x02"), 9, "must be version 1, is version 2"),
    "dtype float": ("idx", lambda p: put(p, 17, b"\x07"), 17, "dtype code"),
    "dtype unknown": ("idx", lambda p: put(p, 17, b"\x63"), 17, "is 99"),
    "dtype other": ("idx", lambda p: put(p, 17, b"\x04"), POINTERS_AT + 8, "sequence 1 must start"),
    "count huge": ("idx", lambda p: put(p, 18, b"\xff" * 8), IDX_END, "ends here"),
    "no sequences": (
        "idx",
        lambda p: p.write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\0\0", 1, 8, 0, 1, 0)),
        18,
        "no text",
    ),
    "length negative": (
        "idx",
        lambda p: put(p, LENGTHS_AT + 4, struct.pack("<i", -1)),
        LENGTHS_AT + 4,
        "sequence 1 has -1 tokens",
    ),
    "offset falls": (
        "idx",
        lambda p: put(p, POINTERS_AT + 16, struct.pack("<q", 4)),
        POINTERS_AT + 16,
        "sequence 2 must start at byte 10",
    ),
    "first offset": (
        "idx",
        lambda p: put(p, POINTERS_AT, struct.pack("<q", 2)),
        POINTERS_AT,
        "sequence 0 must start at byte 0",
    ),
    "first mark": (
        "idx",
        lambda p: put(p, MARKS_AT, struct.pack("<q", 1)),
        MARKS_AT,
        "document mark 0 must be 0",
    ),
    "marks fall": (
        "idx",
        lambda p: put(p, MARKS_AT + 16, struct.pack("<q", 0)),
        MARKS_AT + 16,
        "document 2 must not start before document 1: 0 < 1",
    ),
    "last mark": (
        "idx",
        lambda p: put(p, MARKS_AT + 24, struct.pack("<q", 4)),
        MARKS_AT + 24,
        "document mark 3 must be 3, is 4",
    ),
    "bin empty": ("bin", lambda p: cut(p, 0), 0, "promises 16 bytes"),
    "bin short": ("bin", lambda p: cut(p, 15), 15, "promises 16 bytes"),
    "bin long": ("bin", lambda p: grow(p, b"xyz"), 16, "3 bytes more than the 8 tokens"),
    "token 10 of 10": (
        "bin",
        lambda p: put(p, 12, struct.pack("<H", 10)),
        12,
        "token 6 has id 10, outside a vocabulary of 10",
    ),
}


@pytest.mark.parametrize("chunk_items", [1 << 22, 2, 1])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_file_and_byte(
    prefix: Path, name: str, chunk_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.data.indexed._CHUNK_ITEMS", chunk_items)
    suffix, damage, byte, rule = BROKEN[name]
    path = Path(f"{prefix}.{suffix}")
    damage(path)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: byte {byte}: .*{re.escape(rule)}"
    ):
        IndexedTokens(prefix, vocab_size=10)


def test_negative_ids_are_outside_the_vocabulary(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[1, 2, -3, 4]], np.int32)
    with pytest.raises(ValueError, match=r"t\.bin: byte 8: token 2 has id -3"):
        IndexedTokens(tmp_path / "t", vocab_size=10)


def test_the_bad_token_is_found_in_a_later_chunk(tmp_path: Path) -> None:
    tokens = np.zeros((1 << 22) + 100, np.int32)
    tokens[(1 << 22) + 7] = 10
    write_tokens(tmp_path / "t", [tokens.tolist()], np.int32)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=rf"byte {((1 << 22) + 7) * 4}: token {(1 << 22) + 7} "):
        IndexedTokens(tmp_path / "t", vocab_size=10)
    assert len(IndexedTokens(tmp_path / "t", vocab_size=10, scan=False)) == tokens.size


def test_fingerprint_tells_streams_apart(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", DOCUMENTS)
    write_tokens(tmp_path / "b", DOCUMENTS)
    write_tokens(tmp_path / "c", [[5, 6, 7, 0], [0], [8, 3, 0]])
    write_tokens(tmp_path / "d", [[5, 6, 7], [0, 0], [8, 9, 0]])
    a, b, c, d = (IndexedTokens(tmp_path / name).fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
