"""manifest.json: what a folder of prepared data holds, and reading it with every fault named at once."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from moesys.data.corpus import hash_file

FORMAT = "moesys-data"
VERSION = 1
FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    file: str
    """Name inside the folder."""
    vocab_size: int
    eod_id: int
    xxh3: str
    """xxh3-128 of the file, as all hashes here."""


@dataclass(frozen=True, kw_only=True)
class LengthHistogram:
    """documents[i] have edges_tokens[i] <= tokens < edges_tokens[i + 1], the end-of-document id counted."""

    edges_tokens: list[int]
    documents: list[int]


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    bin: str
    idx: str
    documents: int
    tokens: int
    """One end-of-document id after each document included."""
    bytes: int
    """UTF-8 bytes of the text: what the tokens stand for, by token_bytes.npy."""
    bin_bytes: int
    xxh3_bin: str
    xxh3_idx: str
    length_histogram: LengthHistogram


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """See the fields; JSON has the same names, with `format` and `version` in front."""

    tokenizer: TokenizerInfo
    token_bytes: str
    """Name of the .npy inside the folder: int32 [V], UTF-8 bytes each id stands for."""
    splits: Mapping[str, SplitInfo]
    """"train" and "val"."""
    unigram_bits_per_byte: float
    """Entropy of the training tokens' own frequencies, times tokens / bytes: a context-free model's best."""
    byte_entropy_bits: float
    """Entropy of single bytes of the training text."""
    skipped: Mapping[str, Any]
    """Files or lines that are no document: counts by reason, and the names of the first few."""
    arguments: Mapping[str, Any]
    """What `moesys prep` was given."""
    identity: Mapping[str, Any]
    """What decides the output: arguments with their defaults, hashes of inputs and tokenizer."""

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DataManifest":
        """Read and check FOLDER/manifest.json and that the files it names have the sizes it says.

        Raises:
            ValueError: names the file and every rule it breaks.
        """
        path = Path(folder, FILE)
        if not path.is_file():
            raise ValueError(
                f"{path}: there is no such file: make the folder with `moesys prep --output {folder}`"
            )
        try:
            record = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}): {_AGAIN}") from error
        problems: list[str] = []
        reader = _Reader(record, problems)
        if reader.get("format", str) not in (FORMAT, None):
            problems.append(
                f"format must be {FORMAT!r}, is {record['format']!r}: this is another kind of manifest"
            )
        if reader.get("version", int) not in (VERSION, None):
            problems.append(
                f"version must be {VERSION}, is {record['version']}: use the moesys that wrote it, or prepare again"
            )
        if not problems:
            _check(reader, Path(folder))
        if problems:
            head = "" if len(problems) == 1 else f"{len(problems)} problems\n  - "
            raise ValueError(f"{path}: {head}" + "\n  - ".join(problems))
        return cls(
            tokenizer=_take(TokenizerInfo, record["tokenizer"]),
            token_bytes=record["token_bytes"],
            splits={name: _split(split) for name, split in record["splits"].items()},
            unigram_bits_per_byte=record["unigram_bits_per_byte"],
            byte_entropy_bits=record["byte_entropy_bits"],
            skipped=record["skipped"],
            arguments=record["arguments"],
            identity=record["identity"],
        )

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def verify(self, folder: str | os.PathLike[str]) -> None:
        """Read every file and compare its hash.

        Raises:
            ValueError: names each file that is not the one that was prepared.
        """
        hashes = {self.tokenizer.file: self.tokenizer.xxh3}
        for split in self.splits.values():
            hashes |= {split.bin: split.xxh3_bin, split.idx: split.xxh3_idx}
        wrong = [
            f"{Path(folder, name)}: xxh3 must be {wanted}, is {found}: {_AGAIN}"
            for name, wanted in hashes.items()
            if (found := hash_file(Path(folder, name))) != wanted
        ]
        if wrong:
            raise ValueError("\n".join(wrong))


_T = TypeVar("_T")
_AGAIN = "prepare the folder again with --overwrite, or copy it again"


class _Reader:
    """Looks keys up in nested JSON by dotted path; what is missing or of another type becomes a problem."""

    def __init__(self, record: Any, problems: list[str]) -> None:
        self._record = record
        self.problems = problems

    def get(self, key: str, kind: type | tuple[type, ...], least: float | None = None) -> Any:
        value = self._record
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                self.problems.append(f"{key} is missing: {_AGAIN}")
                return None
            value = value[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(k.__name__ for k in kinds)
            self.problems.append(f"{key} must be {names}, is {value!r}: {_AGAIN}")
            return None
        if least is not None and not value >= least:
            self.problems.append(f"{key} must be >= {least}, is {value}: {_AGAIN}")
            return None
        return value

    def file(self, key: str, folder: Path, size_bytes: int | None = None) -> None:
        """A plain file name that exists beside the manifest, of this size if given."""
        name = self.get(key, str)
        if name is None:
            return
        path = folder / name
        if name != Path(name).name:
            self.problems.append(f"{key} must be a name inside the folder, is {name!r}: {_AGAIN}")
        elif not path.is_file():
            self.problems.append(f"{key}: there is no {path}: {_AGAIN}")
        elif size_bytes is not None and path.stat().st_size != size_bytes:
            self.problems.append(
                f"{key}: {path} must have {size_bytes} bytes, has {path.stat().st_size}: {_AGAIN}"
            )


def _check(reader: _Reader, folder: Path) -> None:
    reader.file("tokenizer.file", folder)
    vocab_size = reader.get("tokenizer.vocab_size", int, 1)
    eod = reader.get("tokenizer.eod_id", int, 0)
    if vocab_size is not None and eod is not None and eod >= vocab_size:
        reader.problems.append(
            f"tokenizer.eod_id={eod} must be below tokenizer.vocab_size={vocab_size}: {_AGAIN}"
        )
    reader.get("tokenizer.xxh3", str)
    reader.file("token_bytes", folder)
    for split in ("train", "val"):
        key = f"splits.{split}"
        reader.get(f"{key}.documents", int, 1)
        reader.get(f"{key}.tokens", int, 1)
        reader.get(f"{key}.bytes", int, 1)
        reader.file(f"{key}.bin", folder, reader.get(f"{key}.bin_bytes", int, 1))
        reader.file(f"{key}.idx", folder)
        reader.get(f"{key}.xxh3_bin", str)
        reader.get(f"{key}.xxh3_idx", str)
        edges = reader.get(f"{key}.length_histogram.edges_tokens", list)
        documents = reader.get(f"{key}.length_histogram.documents", list)
        if edges is not None and documents is not None and len(edges) != len(documents) + 1:
            reader.problems.append(
                f"{key}.length_histogram must have one edge more than counts, has {len(edges)} and {len(documents)}: {_AGAIN}"
            )
    reader.get("unigram_bits_per_byte", (int, float), 0)
    reader.get("byte_entropy_bits", (int, float), 0)
    for key in ("skipped", "arguments", "identity"):
        reader.get(key, dict)


def _take(kind: type[_T], record: dict[str, Any]) -> _T:
    """The fields of a dataclass out of a record that may hold more."""
    return kind(**{field.name: record[field.name] for field in fields(cast(Any, kind))})


def _split(record: dict[str, Any]) -> SplitInfo:
    histogram = _take(LengthHistogram, record["length_histogram"])
    return _take(SplitInfo, {**record, "length_histogram": histogram})
