"""Documents out of files: find them, cut them into parts, read them.

One text file is one document; so is one line of a .jsonl (or .ndjson) file. Any of them may be .gz.
A plain JSONL file may be cut anywhere: a line belongs to the piece in which it starts.
"""

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, cast

import xxhash

STDLIB = "stdlib"
"""The named corpus: the Python standard library's own sources."""
_STDLIB_LEAST_BYTES = 8_000_000
_STDLIB_LEFT_OUT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "turtledemo",
        "__pycache__",
    }
)
_JSONL = (".jsonl", ".ndjson")
# Megatron counts the tokens of a document in 32 bits.
_DOCUMENT_MOST_BYTES = (1 << 31) - 2
_HASH_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file to read, as it was when it was listed."""

    name: str
    """Stable: relative to the input it was found under, with that input's own name in front."""
    path: str
    """Absolute."""
    size_bytes: int
    mtime_ns: int

    @property
    def is_gzip(self) -> bool:
        return self.path.endswith(".gz")

    @property
    def is_jsonl(self) -> bool:
        return self.path.removesuffix(".gz").endswith(_JSONL)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A byte range of a plain JSONL file, or all of any other file."""

    file: InputFile
    start_byte: int
    stop_byte: int


@dataclass(frozen=True, kw_only=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something that is no document: reason is "empty", "undecodable" or "malformed" (JSONL)."""

    name: str
    reason: str


def find_inputs(inputs: Sequence[str], include: Sequence[str] = ()) -> list[InputFile]:
    """The files behind `inputs`, in the order given; a folder's own sorted by path.

    Args:
        inputs: files, folders (read recursively, without hidden entries), or "stdlib".
        include: globs; of a folder, only files whose name or relative path matches one. () = all.

    Raises:
        ValueError: an input is missing, empty or reached twice; all such problems at once.
    """
    found: list[InputFile] = []
    problems: list[str] = []
    for given in inputs:
        path = Path(given)
        if given == STDLIB:
            files = _find_stdlib(problems)
        elif path.is_file():
            files = [_listed(path.name, path)]
        elif path.is_dir():
            files = list(_walk(path, include))
            if not files:
                globs = f" matching {', '.join(include)}" if include else ""
                problems.append(
                    f"--input {given}: no files{globs} in this folder: correct it or --include"
                )
        else:
            problems.append(
                f"--input {given}: no such file or folder: correct it, or use the corpus {STDLIB!r}"
            )
            files = []
        found.extend(files)
    seen: dict[str, str] = {}
    for file in found:
        if file.path in seen:
            problems.append(
                f"--input: {file.path} is given twice ({seen[file.path]}, {file.name}): name it once"
            )
        seen[file.path] = file.name
        if file.size_bytes > _DOCUMENT_MOST_BYTES and not file.is_jsonl:
            problems.append(
                f"{file.path}: one document may have {_DOCUMENT_MOST_BYTES} bytes, it has {file.size_bytes}: "
                "split it, or make it JSONL with a document per line"
            )
    if problems:
        raise ValueError("inputs: " + "\n  - ".join(problems[:20]))
    return found


def hash_file(path: str | os.PathLike[str]) -> str:
    """xxh3-128 of a file's bytes, as hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def cut_into_parts(files: Sequence[InputFile], part_bytes: int) -> list[tuple[Piece, ...]]:
    """All files in order, cut into parts of about `part_bytes` bytes on disk."""
    parts: list[tuple[Piece, ...]] = []
    current: list[Piece] = []
    filled_bytes = 0
    for file in files:
        step = part_bytes if file.is_jsonl and not file.is_gzip else max(1, file.size_bytes)
        for start in range(0, max(1, file.size_bytes), step):
            piece = Piece(file=file, start_byte=start, stop_byte=min(start + step, file.size_bytes))
            current.append(piece)
            filled_bytes += piece.stop_byte - start
            if filled_bytes >= part_bytes:
                parts.append(tuple(current))
                current, filled_bytes = [], 0
    if current:
        parts.append(tuple(current))
    return parts


def read_piece(piece: Piece, jsonl_key: str) -> Iterator[Document | Skipped]:
    """The documents of a piece, in file order.

    Raises:
        ValueError: the file is not what was listed any more, or is a damaged .gz.
    """
    file = piece.file
    try:
        if file.is_jsonl:
            yield from _read_jsonl(piece, jsonl_key)
        else:
            with _open(file) as stream:
                raw = stream.read(_DOCUMENT_MOST_BYTES + 1)
            if len(raw) > _DOCUMENT_MOST_BYTES:
                raise ValueError(
                    f"{file.path}: one document may have {_DOCUMENT_MOST_BYTES} bytes: split it"
                )
            yield _decoded(file.name, raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file.path}: damaged .gz ({error}): copy it again, or leave it out"
        ) from error
    _check_unchanged(file)


def _read_jsonl(piece: Piece, key: str) -> Iterator[Document | Skipped]:
    file = piece.file
    with _open(file) as stream:
        position = piece.start_byte
        if position > 0:
            # A line that began in the piece before is that piece's.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while file.is_gzip or position < piece.stop_byte:
            line = stream.readline()
            if not line:
                break
            yield _parsed(f"{file.name}@{position}", line, key)
            position += len(line)


def _parsed(name: str, line: bytes, key: str) -> Document | Skipped:
    if not line.strip():
        return Skipped(name=name, reason="empty")
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Skipped(name=name, reason="undecodable")
    except (ValueError, RecursionError):
        return Skipped(name=name, reason="malformed")
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Skipped(name=name, reason="malformed")
    # JSON can spell half a surrogate pair, which no UTF-8 text holds.
    return _decoded(name, text.encode("utf-8", "surrogatepass"))


def _decoded(name: str, raw: bytes) -> Document | Skipped:
    if not raw:
        return Skipped(name=name, reason="empty")
    try:
        return Document(name=name, text=raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Skipped(name=name, reason="undecodable")


def _open(file: InputFile) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file.path, "rb") if file.is_gzip else open(file.path, "rb"))


def _check_unchanged(file: InputFile) -> None:
    now = os.stat(file.path)
    if (now.st_size, now.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
        raise ValueError(
            f"{file.path}: changed while it was being read: let it settle, then run again"
        )


def _walk(
    root: Path, include: Sequence[str], left_out: frozenset[str] = frozenset()
) -> Iterator[InputFile]:
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    relatives = sorted(
        (path.relative_to(root).as_posix(), path) for path in paths if path.is_file()
    )
    for relative, path in relatives:
        name = relative.rsplit("/", 1)[-1]
        if not include or any(fnmatch(name, glob) or fnmatch(relative, glob) for glob in include):
            yield _listed(f"{root.resolve().name}/{relative}", path)


def _find_stdlib(problems: list[str]) -> list[InputFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_walk(root, ("*.py",), _STDLIB_LEFT_OUT))
    size = sum(file.size_bytes for file in files)
    if size < _STDLIB_LEAST_BYTES:
        problems.append(
            f"--input {STDLIB}: needs {_STDLIB_LEAST_BYTES} bytes of .py files in {root}, found {size} "
            "(this Python came without its sources): give a folder of text instead"
        )
    return files


def _listed(name: str, path: Path) -> InputFile:
    status = path.stat()
    return InputFile(
        name=name,
        path=os.path.abspath(path),
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )
