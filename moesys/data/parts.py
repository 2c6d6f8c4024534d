"""One part of a corpus, tokenised: the unit of work that is done in parallel, kept, and resumed.

A part file is an uncompressed .npz (its members carry a CRC, which reading checks), written beside its
name and renamed, so a part file that exists is whole. The same part gives the same arrays on any worker.

Shapes: N tokens, D documents of one split of this part.
"""

import json
import multiprocessing
import os
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from moesys.data.corpus import Document, Piece, read_piece
from moesys.data.tokenizer import eod_id, load_tokenizer, normalized, token_bytes

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
_SKIPPED_NAMES_KEPT = 20
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """All that a worker needs to know."""

    index: int
    pieces: tuple[Piece, ...]
    jsonl_key: str
    seed: int
    val_fraction: float
    tokenizer_path: str
    eod_token: str
    folder: str

    @property
    def path(self) -> Path:
        return Path(self.folder, f"part-{self.index:06d}.npz")


@dataclass
class Counts:
    """What was read: documents kept and skipped, UTF-8 bytes of the kept ones."""

    documents: dict[str, int]
    text_bytes: dict[str, int]
    skipped: dict[str, int]
    skipped_names: list[str]
    """The first few, as "name (reason)"."""

    @classmethod
    def zero(cls) -> "Counts":
        return cls(
            documents=dict.fromkeys(SPLITS, 0),
            text_bytes=dict.fromkeys(SPLITS, 0),
            skipped={},
            skipped_names=[],
        )

    def add(self, other: "Counts") -> None:
        for split in SPLITS:
            self.documents[split] += other.documents[split]
            self.text_bytes[split] += other.text_bytes[split]
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        room = _SKIPPED_NAMES_KEPT - len(self.skipped_names)
        self.skipped_names += other.skipped_names[: max(0, room)]


@dataclass(frozen=True, kw_only=True)
class TokenisedPart:
    tokens_N: dict[Split, np.ndarray]
    """uint16 or int32; each document closed by the end-of-document id."""
    lengths_D: dict[Split, np.ndarray]
    """int64: tokens of each document, that id included."""
    train_byte_counts: np.ndarray
    """int64 [256]: how often each byte value occurs in the training text."""
    counts: Counts


def split_of(text: bytes, *, seed: int, val_fraction: float) -> Split:
    """The split of a document, by its content: equal documents are never on both sides."""
    share = xxhash.xxh3_64_intdigest(text, seed=seed) / 2**64
    return "val" if share < val_fraction else "train"


def documents_with_split(
    pieces: Iterable[Piece], *, jsonl_key: str, seed: int, val_fraction: float, counts: Counts
) -> Iterator[tuple[Document, Split]]:
    """The documents of some pieces with the split of each; what is skipped goes into `counts`."""
    for piece in pieces:
        for item in read_piece(piece, jsonl_key):
            if isinstance(item, Document):
                yield item, split_of(item.text.encode(), seed=seed, val_fraction=val_fraction)
            else:
                counts.skipped[item.reason] = counts.skipped.get(item.reason, 0) + 1
                if len(counts.skipped_names) < _SKIPPED_NAMES_KEPT:
                    counts.skipped_names.append(f"{item.name} ({item.reason})")


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """How tokens are kept in part files."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def tokenise_part(job: PartJob) -> int:
    """Read, tokenise and write one part; returns its index.

    Raises:
        ValueError: an input changed or is damaged, or the tokenizer loses or adds bytes.
    """
    tokenizer = load_tokenizer(job.tokenizer_path)
    bytes_V = token_bytes(tokenizer, job.tokenizer_path)
    eod = eod_id(tokenizer, job.eod_token, job.tokenizer_path)
    dtype = token_dtype(bytes_V.size)
    counts = Counts.zero()
    byte_counts = np.zeros(256, dtype=np.int64)
    tokens: dict[Split, list[np.ndarray]] = {"train": [], "val": []}
    lengths: dict[Split, list[int]] = {"train": [], "val": []}

    def tokenise(batch: list[tuple[Document, Split]]) -> None:
        texts = [normalized(tokenizer, document.text) for document, _ in batch]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for (document, split), text, encoding in zip(batch, texts, encodings, strict=True):
            raw = text.encode()
            ids = np.array([*encoding.ids, eod], dtype=dtype)
            counted = int(bytes_V[ids].sum(dtype=np.int64))
            if counted != len(raw):
                raise ValueError(
                    f"{job.tokenizer_path}: the tokens of {document.name} stand for {counted} bytes but its text has "
                    f"{len(raw)}: use a tokenizer that neither drops nor adds text (no prefix space, no unknown token)"
                )
            tokens[split].append(ids)
            lengths[split].append(ids.size)
            counts.documents[split] += 1
            counts.text_bytes[split] += len(raw)
            if split == "train":
                byte_counts[:] += np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256)

    batch: list[tuple[Document, Split]] = []
    waiting = 0
    for item in documents_with_split(
        job.pieces,
        jsonl_key=job.jsonl_key,
        seed=job.seed,
        val_fraction=job.val_fraction,
        counts=counts,
    ):
        batch.append(item)
        waiting += len(item[0].text)
        if waiting >= _BATCH_CHARACTERS:
            tokenise(batch)
            batch, waiting = [], 0
    tokenise(batch)
    part = TokenisedPart(
        tokens_N={split: np.concatenate([np.empty(0, dtype), *tokens[split]]) for split in SPLITS},
        lengths_D={split: np.array(lengths[split], dtype=np.int64) for split in SPLITS},
        train_byte_counts=byte_counts,
        counts=counts,
    )
    _write_part(job.path, part)
    return job.index


def read_part(path: Path) -> TokenisedPart | None:
    """A part, or None if there is no whole one at `path`."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return TokenisedPart(
                tokens_N={split: stored[f"{split}_tokens"] for split in SPLITS},
                lengths_D={split: stored[f"{split}_lengths"] for split in SPLITS},
                train_byte_counts=stored["train_byte_counts"],
                counts=Counts(**json.loads(stored["counts"].tobytes())),
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        return None


def _write_part(path: Path, part: TokenisedPart) -> None:
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with open(beside, "wb") as file:
        np.savez(
            file,
            train_tokens=part.tokens_N["train"],
            train_lengths=part.lengths_D["train"],
            val_tokens=part.tokens_N["val"],
            val_lengths=part.lengths_D["val"],
            train_byte_counts=part.train_byte_counts,
            counts=np.frombuffer(json.dumps(asdict(part.counts)).encode(), dtype=np.uint8),
        )
    os.replace(beside, path)


def start_worker() -> None:
    """First thing in each worker process: one core, ctrl-C left to the parent, and no life after it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
