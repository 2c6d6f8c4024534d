"""Finding, cutting and reading documents."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.data.corpus import Document, InputFile, Skipped, cut_into_parts, find_inputs, read_piece


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(
    files: list[InputFile], part_bytes: int = 1 << 30, key: str = "text"
) -> list[Document | Skipped]:
    parts = cut_into_parts(files, part_bytes)
    return [item for pieces in parts for piece in pieces for item in read_piece(piece, key)]


def texts(items: list[Document | Skipped]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items: list[Document | Skipped]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Skipped)]


def test_folders_are_read_sorted_without_hidden_entries(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/y.txt", ".git/x.py", "a/.hidden.py", "c.py.gz"):
        write(tmp_path / "top" / name, name)
    assert [f.name for f in find_inputs([str(tmp_path / "top")])] == [
        "top/a/y.txt",
        "top/a/z.py",
        "top/b.py",
        "top/c.py.gz",
    ]
    found = find_inputs([str(tmp_path / "top")], ["*.py", "a/*.txt"])
    assert [f.name for f in found] == ["top/a/y.txt", "top/a/z.py", "top/b.py"]


def test_every_bad_input_is_told(tmp_path: Path) -> None:
    file = str(write(tmp_path / "d" / "a.txt", "a"))
    with pytest.raises(ValueError, match="no such file or folder") as caught:
        find_inputs([str(tmp_path / "nothing"), str(tmp_path / "d"), file])
    assert f"{file} is given twice (d/a.txt, a.txt)" in str(caught.value)
    with pytest.raises(ValueError, match=r"no files matching \*\.py in this folder"):
        find_inputs([str(tmp_path / "d")], ["*.py"])


def test_the_standard_library_is_a_corpus() -> None:
    found = find_inputs(["stdlib"])
    names = {file.name.split("/", 1)[1] for file in found}
    assert {"os.py", "json/decoder.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(n.split("/")) for n in names)
    assert sum(file.size_bytes for file in found) > 8_000_000


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    lines = [{"text": "one"}, {"text": "zwei\n中"}, {"other": 1}, {"text": 5}, {"text": ""}]
    jsonl = "\n".join(json.dumps(line) for line in lines).encode()
    jsonl += b'\n\n{"text": "\xff"}\n{"text": "\\ud800"}\n[1]\nnot json\n{"text": "last"}'
    write(tmp_path / "a.txt", "plain\r\n")
    write(tmp_path / "b.txt.gz", "packed")
    write(tmp_path / "c.jsonl", jsonl)
    write(tmp_path / "d.jsonl.gz", jsonl)
    write(tmp_path / "e.txt", b"\xff\xfe")
    write(tmp_path / "f.txt", b"")
    items = read(find_inputs([str(tmp_path)]))
    lines_kept = ["one", "zwei\n中", "last"]
    assert texts(items) == ["plain\r\n", "packed", *lines_kept, *lines_kept]
    per_jsonl = ["malformed", "malformed", "empty", "empty", "undecodable", "undecodable"]
    per_jsonl += ["malformed", "malformed"]
    assert reasons(items) == [*per_jsonl, *per_jsonl, "undecodable", "empty"]


def test_the_key_of_a_line_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl", '{"content": "x", "text": "y"}\n')
    assert texts(read(find_inputs([str(tmp_path / "c.jsonl")]), key="content")) == ["x"]


@settings(max_examples=60)
@given(
    lines=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=12),
    part_bytes=st.integers(1, 60),
    ends_with_newline=st.booleans(),
)
def test_jsonl_may_be_cut_anywhere(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    part_bytes: int,
    ends_with_newline: bool,
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    path = write(folder / "a.jsonl", content + ("\n" if ends_with_newline else ""))
    write(folder / "b.txt", "after")
    files = find_inputs([str(path), str(folder / "b.txt")])
    parts = cut_into_parts(files, part_bytes)
    assert read(files, part_bytes) == read(files)
    assert texts(read(files)) == [*(line for line in lines if line), "after"]
    assert len(parts) >= path.stat().st_size // part_bytes


def test_parts_hold_all_files_once_in_order(tmp_path: Path) -> None:
    for index, size in enumerate([10, 0, 50, 5, 5, 200, 1]):
        write(tmp_path / f"{index}.txt", "x" * size)
    parts = cut_into_parts(find_inputs([str(tmp_path)]), 60)
    names = [[piece.file.name[-5:-4] for piece in part] for part in parts]
    assert names == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "before")
    files = find_inputs([str(path)])
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match=r"a\.txt: changed while it was being read"):
        read(files)


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(10_000))
    for name, raw in (("cut.txt.gz", whole[:5000]), ("plain.txt.gz", b"plain")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=rf"{name}: damaged \.gz"):
            read(find_inputs([str(tmp_path / name)]))
    bad = bytearray(whole)
    bad[-6] ^= 1  # the checksum
    (tmp_path / "crc.jsonl.gz").write_bytes(bad)
    with pytest.raises(ValueError, match=r"crc\.jsonl\.gz: damaged \.gz"):
        read(find_inputs([str(tmp_path / "crc.jsonl.gz")]))
