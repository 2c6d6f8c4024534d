"""A manifest that breaks rules is refused with all of them, and the file it stands in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesys.data.manifest import DataManifest

SPLIT = {
    "documents": 3,
    "tokens": 8,
    "bytes": 20,
    "bin_bytes": 16,
    "xxh3_bin": "00",
    "xxh3_idx": "00",
    "length_histogram": {"edges_tokens": [1, 2, 4, 8], "documents": [1, 1, 1]},
}
RECORD = {
    "format": "moesys-data",
    "version": 1,
    "tokenizer": {"file": "tokenizer.json", "vocab_size": 10, "eod_id": 0, "xxh3": "00"},
    "token_bytes": "token_bytes.npy",
    "splits": {
        name: {"bin": f"{name}.bin", "idx": f"{name}.idx", **SPLIT} for name in ("train", "val")
    },
    "unigram_bits_per_byte": 2.5,
    "byte_entropy_bits": 4,
    "skipped": {},
    "arguments": {},
    "identity": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "token_bytes.npy", "train.idx", "val.idx"):
        (tmp_path / name).touch()
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(16))
    (tmp_path / "manifest.json").write_text(json.dumps(RECORD))
    return tmp_path


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    edit(record)
    (folder / "manifest.json").write_text(json.dumps(record))


def test_what_is_written_is_read_back(folder: Path) -> None:
    manifest = DataManifest.load(folder)
    assert manifest.to_json() == RECORD
    assert manifest.splits["train"].length_histogram.edges_tokens == [1, 2, 4, 8]


def test_keys_of_a_later_moesys_are_left_alone(folder: Path) -> None:
    change(folder, lambda r: r["splits"]["val"].update(new=1))
    change(folder, lambda r: r["tokenizer"].update(new=1))
    change(folder, lambda r: r.update(new=1))
    assert DataManifest.load(folder).to_json() == RECORD


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda r: r.update(format="other"), "format must be 'moesys-data', is 'other'"),
        (lambda r: r.update(version=2), "version must be 1, is 2"),
        (lambda r: r.pop("version"), "version is missing"),
        (lambda r: r.pop("splits"), "splits.val.tokens is missing"),
        (lambda r: r["tokenizer"].update(file="../t.json"), "must be a name inside the folder"),
        (lambda r: r["tokenizer"].update(file="no.json"), "there is no"),
        (
            lambda r: r["tokenizer"].update(eod_id=10),
            "eod_id=10 must be below tokenizer.vocab_size=10",
        ),
        (lambda r: r["tokenizer"].update(vocab_size=True), "vocab_size must be int, is True"),
        (lambda r: r["splits"]["val"].update(tokens="8"), "splits.val.tokens must be int, is '8'"),
        (lambda r: r["splits"]["val"].update(bytes=0), "splits.val.bytes must be >= 1, is 0"),
        (lambda r: r["splits"]["train"].update(bin_bytes=18), "must have 18 bytes, has 16"),
        (lambda r: r["splits"]["val"]["length_histogram"].update(documents=[3]), "one edge more"),
        (lambda r: r.update(unigram_bits_per_byte=float("nan")), "must be >= 0, is nan"),
        (lambda r: r.update(identity=[]), "identity must be dict"),
    ],
)
def test_a_broken_rule_is_named(folder: Path, edit: Callable[[Any], object], problem: str) -> None:
    change(folder, edit)
    with pytest.raises(ValueError, match=r"manifest\.json: ") as caught:
        DataManifest.load(folder)
    assert problem in str(caught.value)


def test_all_broken_rules_are_named_at_once(folder: Path) -> None:
    (folder / "val.idx").unlink()
    change(folder, lambda r: r["splits"]["train"].update(documents=0))
    change(folder, lambda r: r.pop("byte_entropy_bits"))
    with pytest.raises(ValueError, match="3 problems") as caught:
        DataManifest.load(folder)
    for problem in ("there is no", "train.documents must be >= 1", "byte_entropy_bits is missing"):
        assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": 3}'])
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        DataManifest.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json: there is no such file: make the folder"):
        DataManifest.load(folder)


def test_verify_names_every_file_that_is_another(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.bin: xxh3 must be 00, is ") as caught:
        DataManifest.load(folder).verify(folder)
    for name in ("tokenizer.json", "train.idx", "val.bin", "val.idx"):
        assert f"{name}: xxh3" in str(caught.value)
