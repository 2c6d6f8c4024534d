"""What a prep is made from: its arguments, its inputs as they are now, and the identity both decide.

Two preps of one identity make the same bytes. The number of workers and the names of the folders that
the inputs and the output lie in are no part of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from moesys.data.corpus import (
    Document,
    InputFile,
    Piece,
    cut_into_parts,
    find_inputs,
    hash_file,
)
from moesys.data.parts import Counts, PartJob, Split, documents_with_split
from moesys.data.tokenizer import EOD_TOKEN, SMALLEST_VOCAB_SIZE

_VERSION = 1
"""Counts the changes of this code that change what it makes."""
_LEAST_PART_BYTES = 1 << 20
_MOST_PART_BYTES = 64 << 20
_PARTS_WANTED = 256


@dataclass(frozen=True, kw_only=True)
class PrepArguments:
    """What `moesys prep` can be told."""

    inputs: Sequence[str]
    """Files, folders, or "stdlib"."""
    output: str
    include: Sequence[str] = ()
    """Globs for the files of folders; () = all."""
    jsonl_key: str = "text"
    tokenizer: str | None = None
    """A byte-level tokenizer.json; None = train one on the training documents."""
    vocab_size: int | None = None
    """Of the trained tokenizer; None = 4096, or whatever `tokenizer` has."""
    tokenizer_sample_bytes: int = 256 << 20
    """A larger corpus trains the tokenizer on evenly spaced parts of about this size together."""
    eod_token: str = EOD_TOKEN
    val_fraction: float = 0.02
    seed: int = 0
    """Decides which documents are held out."""
    part_bytes: int | None = None
    """Text per unit of work; None = a 256th of the input, between 1 and 64 MiB."""
    workers: int = 1
    overwrite: bool = False
    """Replace what another prep left in `output`."""

    @property
    def trained_vocab_size(self) -> int:
        return 4096 if self.vocab_size is None else self.vocab_size

    def check(self) -> None:
        """Raises ValueError with every argument that is out of range."""
        problems = []
        if not 0 < self.val_fraction < 1:
            problems.append(
                f"--val-fraction {self.val_fraction} must lie between 0 and 1: use e.g. 0.02"
            )
        if not 0 <= self.seed < 1 << 63:
            problems.append(f"--seed {self.seed} must lie in [0, 2**63): use e.g. 0")
        if self.tokenizer is None:
            if self.trained_vocab_size < SMALLEST_VOCAB_SIZE:
                problems.append(
                    f"--vocab-size {self.vocab_size} must be at least {SMALLEST_VOCAB_SIZE} "
                    f"(256 bytes and {EOD_TOKEN}): use e.g. 4096"
                )
            if self.eod_token != EOD_TOKEN:
                problems.append(
                    f"--eod-token {self.eod_token!r} needs --tokenizer: a trained one has {EOD_TOKEN}"
                )
        else:
            if not Path(self.tokenizer).is_file():
                problems.append(
                    f"--tokenizer {self.tokenizer}: no such file: give a tokenizer.json"
                )
            if self.vocab_size is not None:
                problems.append(
                    f"--vocab-size {self.vocab_size} has no effect with --tokenizer: leave one out"
                )
        for flag, value in (
            ("--workers", self.workers),
            ("--part-bytes", self.part_bytes),
            ("--tokenizer-sample-bytes", self.tokenizer_sample_bytes),
        ):
            if value is not None and value < 1:
                problems.append(f"{flag} {value} must be at least 1")
        if problems:
            raise ValueError("\n  ".join(problems))


class Reporter(Protocol):
    """Where progress goes."""

    def line(self, text: str) -> None: ...

    def phase(self, label: str, total_bytes: int, done_bytes: int = 0) -> None: ...

    def advance(self, count_bytes: int) -> None: ...


class Recipe:
    """Arguments and inputs, listed and hashed; the parts they are cut into; the identity.

    Args:
        arguments: checked here.
        listing_before: `listing` of an earlier recipe. A file whose size and time are still the same is
            not read again for its hash.

    Raises:
        ValueError: arguments out of range, or inputs that are missing or unfit.
    """

    def __init__(
        self,
        arguments: PrepArguments,
        reporter: Reporter,
        listing_before: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        arguments.check()
        self.arguments = arguments
        self.files = find_inputs(arguments.inputs, arguments.include)
        self.total_bytes = sum(file.size_bytes for file in self.files)
        known = {(f["path"], f["size_bytes"], f["mtime_ns"]): f["xxh3"] for f in listing_before}
        hashes = _hashes(self.files, known, reporter, arguments.workers)
        self.listing = [
            {**asdict(file), "xxh3": digest}
            for file, digest in zip(self.files, hashes, strict=True)
        ]
        """One JSON object per input file, in order."""
        part_bytes = arguments.part_bytes or min(
            max(self.total_bytes // _PARTS_WANTED, _LEAST_PART_BYTES), _MOST_PART_BYTES
        )
        self.parts = cut_into_parts(self.files, part_bytes)
        self.identity = self._identity(part_bytes)
        """Plain JSON values."""

    def manifest_arguments(self) -> dict[str, Any]:
        """The arguments as given, without those that change nothing in the output."""
        given = asdict(self.arguments)
        return {key: given[key] for key in given if key not in ("workers", "overwrite", "output")}

    def jobs(self, tokenizer_path: Path, folder: Path) -> list[PartJob]:
        """One job per part; part files go to `folder`."""
        arguments = self.arguments
        return [
            PartJob(
                index=index,
                pieces=pieces,
                jsonl_key=arguments.jsonl_key,
                seed=arguments.seed,
                val_fraction=arguments.val_fraction,
                tokenizer_path=str(tokenizer_path),
                eod_token=arguments.eod_token,
                folder=str(folder),
            )
            for index, pieces in enumerate(self.parts)
        ]

    def documents(
        self, pieces: Sequence[Piece], counts: Counts
    ) -> Iterator[tuple[Document, Split]]:
        """Documents with their split; what is skipped is added to `counts`."""
        return documents_with_split(
            pieces,
            jsonl_key=self.arguments.jsonl_key,
            seed=self.arguments.seed,
            val_fraction=self.arguments.val_fraction,
            counts=counts,
        )

    def tokenizer_parts(self) -> list[tuple[Piece, ...]]:
        """The parts a tokenizer is trained on: all, or evenly spaced ones that make up the sample."""
        wanted = len(self.parts) * self.arguments.tokenizer_sample_bytes // max(1, self.total_bytes)
        count = max(1, min(len(self.parts), wanted))
        return [self.parts[k * len(self.parts) // count] for k in range(count)]

    def changes(
        self, identity: Mapping[str, Any], listing_before: Sequence[Mapping[str, Any]]
    ) -> str:
        """How another identity differs from this one, in words; empty if it does not."""
        changes = [
            f"{key} was {identity.get(key)!r}, now {value!r}"
            for key, value in self.identity.items()
            if identity.get(key) != value and key not in _TOLD_BY_FILES
        ]
        if any(identity.get(key) != self.identity[key] for key in _TOLD_BY_FILES):
            before = {file["name"]: file["xxh3"] for file in listing_before}
            now = {file["name"]: file["xxh3"] for file in self.listing}
            names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            changes.append(f"input files changed: {', '.join(names[:5]) or 'their order'}{more}")
        return "; ".join(changes)

    def _identity(self, part_bytes: int) -> dict[str, Any]:
        digest = xxhash.xxh3_128()
        for file in self.listing:
            digest.update(f"{file['name']}\0{file['size_bytes']}\0{file['xxh3']}\0".encode())
        arguments = self.arguments
        trained = arguments.tokenizer is None
        return {
            "version": _VERSION,
            "inputs": digest.hexdigest(),
            "input_files": len(self.files),
            "input_bytes": self.total_bytes,
            "jsonl_key": arguments.jsonl_key,
            "tokenizer": "trained"
            if arguments.tokenizer is None
            else hash_file(arguments.tokenizer),
            "vocab_size": arguments.trained_vocab_size if trained else None,
            "tokenizer_sample_bytes": arguments.tokenizer_sample_bytes if trained else None,
            "eod_token": arguments.eod_token,
            "val_fraction": arguments.val_fraction,
            "seed": arguments.seed,
            "part_bytes": part_bytes,
        }


def _hashes(
    files: Sequence[InputFile],
    known: Mapping[tuple[str, int, int], str],
    reporter: Reporter,
    threads: int,
) -> list[str]:
    """xxh3-128 of each file; a file known by path, size and time is not read again."""

    def hash_of(file: InputFile) -> str:
        digest = known.get((file.path, file.size_bytes, file.mtime_ns))
        return hash_file(file.path) if digest is None else digest

    reporter.phase("listing the inputs", sum(file.size_bytes for file in files))
    hashes = []
    with ThreadPoolExecutor(threads) as pool:
        for file, digest in zip(files, pool.map(hash_of, files), strict=True):
            hashes.append(digest)
            reporter.advance(file.size_bytes)
    return hashes


_TOLD_BY_FILES = ("inputs", "input_files", "input_bytes")


def size_of(pieces: Sequence[Piece]) -> int:
    """Bytes on disk."""
    return sum(piece.stop_byte - piece.start_byte for piece in pieces)
