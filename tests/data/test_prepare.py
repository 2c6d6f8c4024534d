"""The prepared folder: its figures are true, its bytes depend on inputs and arguments alone."""

import fcntl
import json
import math
import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from moesys.data.assemble import entropy_bits
from moesys.data.indexed import IndexedTokens
from moesys.data.manifest import DataManifest
from moesys.data.parts import split_of
from moesys.data.prepare import Prepared, dry_run, prepare
from moesys.data.recipe import PrepArguments, Recipe
from tests.data.files import Silent, write_words


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but inputs.json, which tells absolute paths and times."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name != "inputs.json"
    }


def prep(source: Path, output: Path, **changed: Any) -> tuple[Prepared, list[str]]:
    reporter = Silent()
    arguments = {"vocab_size": 400, "val_fraction": 0.25, "part_bytes": 4000, "workers": 1}
    return (
        prepare(
            PrepArguments(inputs=[str(source)], output=str(output), **{**arguments, **changed}),
            reporter,
        ),
        reporter.lines,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 files; two are equal, one is empty, one is no text, one quotes the end-of-document token."""
    folder = tmp_path_factory.mktemp("corpus") / "words"
    write_words(folder, 40, 60)
    (folder / "0001.txt").write_bytes((folder / "0030.txt").read_bytes())
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "quotes.txt").write_text("before <|endoftext|> after")
    return folder


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "data"
    prep(corpus, output)
    return output


def documents_of(folder: Path, split: str) -> list[str]:
    manifest = DataManifest.load(folder)
    tokens = IndexedTokens(folder / split, manifest.tokenizer.vocab_size)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = tokens.document_offsets
    documents = [tokens.tokens_N[a:b].tolist() for a, b in pairwise(ends)]
    eod = manifest.tokenizer.eod_id
    assert all(document[-1] == eod and eod not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in documents]


def test_every_document_comes_back_whole_in_order_on_one_side(folder: Path, corpus: Path) -> None:
    wanted: dict[str, list[str]] = {"train": [], "val": []}
    for path in sorted(corpus.iterdir()):
        if path.name not in ("empty.txt", "binary.txt"):
            wanted[split_of(path.read_bytes(), seed=0, val_fraction=0.25)].append(path.read_text())
    got = {split: documents_of(folder, split) for split in ("train", "val")}
    assert got == wanted
    assert not set(got["train"]) & set(got["val"])
    assert sum(map(len, got.values())) == 41  # the equal ones are both kept


def test_the_figures_of_the_manifest_are_true(folder: Path) -> None:
    manifest = DataManifest.load(folder)
    manifest.verify(folder)
    bytes_V = np.load(folder / "token_bytes.npy")
    assert bytes_V.dtype == np.int32
    assert bytes_V.shape == (manifest.tokenizer.vocab_size,) == (400,)
    for name, split in manifest.splits.items():
        tokens = IndexedTokens(folder / name)
        texts = documents_of(folder, name)
        assert tokens.tokens_N.dtype == np.uint16
        assert split.documents == len(texts) == tokens.num_documents
        assert split.tokens == len(tokens)
        assert split.bytes == sum(len(t.encode()) for t in texts) == bytes_V[tokens.tokens_N].sum()
        lengths = np.diff(tokens.document_offsets)
        edges = split.length_histogram.edges_tokens
        assert edges == [2**k for k in range(len(edges))]
        assert split.length_histogram.documents == np.histogram(lengths, edges)[0].tolist()
        assert sum(split.length_histogram.documents) == split.documents
    ids = Counter(IndexedTokens(folder / "train").tokens_N.tolist())
    train = manifest.splits["train"]
    bits = -sum(n * math.log2(n / train.tokens) for n in ids.values()) / train.bytes
    assert manifest.unigram_bits_per_byte == pytest.approx(bits, rel=1e-12)
    single = Counter("".join(documents_of(folder, "train")).encode())
    entropy = -sum(n / train.bytes * math.log2(n / train.bytes) for n in single.values())
    assert manifest.byte_entropy_bits == pytest.approx(entropy, rel=1e-12)
    assert manifest.skipped == {
        "empty": 1,
        "undecodable": 1,
        "first": ["words/binary.txt (undecodable)", "words/empty.txt (empty)"],
    }


def test_entropy() -> None:
    assert entropy_bits(np.array([1, 0, 1, 2])) == 1.5
    assert entropy_bits(np.array([7, 0])) == 0
    assert entropy_bits(np.zeros(3)) == 0


def test_neither_workers_nor_part_size_nor_place_change_the_bytes(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    prep(corpus, tmp_path / "three", workers=3)
    theirs, ours = contents(tmp_path / "three"), contents(folder)
    assert theirs == ours
    prep(corpus, tmp_path / "large", part_bytes=1 << 30)
    theirs = contents(tmp_path / "large")
    del theirs["manifest.json"]  # it tells the part size
    assert theirs == {name: ours[name] for name in theirs}
    (tmp_path / "moved").mkdir()
    for path in corpus.iterdir():
        (tmp_path / "moved" / "words").mkdir(exist_ok=True)
        (tmp_path / "moved" / "words" / path.name).write_bytes(path.read_bytes())
    prepared, _ = prep(tmp_path / "moved" / "words", folder)
    assert prepared.was_finished


def test_a_finished_prep_is_left_alone(folder: Path, corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepared, lines = prep(corpus, folder)
    assert prepared.was_finished
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_arguments_or_inputs_are_noticed(folder: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    prep(corpus, output)
    before = contents(output)
    with pytest.raises(
        ValueError, match=r"holds the prep of something else .*--overwrite"
    ) as caught:
        prep(corpus, output, seed=1, vocab_size=300)
    assert "seed was 0, now 1" in str(caught.value)
    assert "vocab_size was 400, now 300" in str(caught.value)
    changed = tmp_path / "words"
    changed.mkdir()
    for path in corpus.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "0007.txt").write_text("changed")
    (changed / "0008.txt").unlink()
    with pytest.raises(
        ValueError, match=r"input files changed: words/0007\.txt, words/0008\.txt\)"
    ):
        prep(changed, output)
    assert contents(output) == before
    _, lines = prep(changed, output, overwrite=True)
    assert "starting over" in lines[0]
    assert contents(output) != before
    prepared, _ = prep(changed, output, overwrite=True)
    assert prepared.was_finished


def test_a_changed_file_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    words = tmp_path / "words"
    write_words(words, 12, 40)
    prep(words, tmp_path / "data")
    path = words / "0003.txt"
    path.write_bytes(b"#" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"input files changed: words/0003\.txt\)"):
        prep(words, tmp_path / "data")


def test_files_of_somebody_else_are_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds train\.bin without a manifest\.json"):
        prep(corpus, tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == b"precious"


def test_a_damaged_folder_is_noticed_and_can_be_made_again(corpus: Path, tmp_path: Path) -> None:
    prep(corpus, tmp_path / "data")
    before = contents(tmp_path / "data")
    os.truncate(tmp_path / "data" / "train.bin", 10)
    with pytest.raises(ValueError, match=r"train\.bin must have \d+ bytes, has 10: .*--overwrite"):
        prep(corpus, tmp_path / "data")
    prep(corpus, tmp_path / "data", overwrite=True)
    assert contents(tmp_path / "data") == before


def test_a_user_s_tokenizer_is_used_as_it_is(folder: Path, corpus: Path, tmp_path: Path) -> None:
    path = folder / "tokenizer.json"
    prep(corpus, tmp_path / "data", tokenizer=str(path), vocab_size=None)
    theirs, ours = contents(tmp_path / "data"), contents(folder)
    for name in theirs.keys() - {"manifest.json"}:
        assert theirs[name] == ours[name]


def test_a_large_vocabulary_takes_four_bytes_per_token(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    record = json.loads((folder / "tokenizer.json").read_text())
    record["added_tokens"].append(
        {**record["added_tokens"][0], "id": 70_000, "content": "<|last|>"}
    )
    record["model"]["vocab"]["<|last|>"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(record))
    prepared, _ = prep(
        corpus, tmp_path / "data", tokenizer=str(tmp_path / "large.json"), vocab_size=None
    )
    assert prepared.manifest.tokenizer.vocab_size == 70_001
    tokens = IndexedTokens(tmp_path / "data" / "train").tokens_N
    assert tokens.dtype == np.int32
    assert np.array_equal(tokens, IndexedTokens(folder / "train").tokens_N)


def test_composed_accents_are_counted_as_the_tokenizer_sees_them(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "nfc.json"))
    (tmp_path / "text.jsonl").write_text(
        "".join(f'{{"text": "u\u0308ber {k}"}}\n' for k in range(50))
    )
    prepared, _ = prep(
        tmp_path / "text.jsonl",
        tmp_path / "d",
        tokenizer=str(tmp_path / "nfc.json"),
        vocab_size=None,
    )
    total = sum(split.bytes for split in prepared.manifest.splits.values())
    assert total == sum(len(f"\u00fcber {k}".encode()) for k in range(50))


def test_a_tokenizer_that_adds_text_is_refused(folder: Path, corpus: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "t.json"))
    with pytest.raises(
        ValueError, match=r"the tokens of words/\S+ stand for \d+ bytes but its text has"
    ):
        prep(corpus, tmp_path / "data", tokenizer=str(tmp_path / "t.json"), vocab_size=None)


def test_an_empty_side_or_nothing_at_all_is_told_and_leaves_the_folder_free(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a single document " * 10)
    with pytest.raises(
        ValueError, match=r"the (val|train) split is empty: .* of 1 documents .*change --val"
    ):
        prep(tmp_path / "one.txt", tmp_path / "data")
    (tmp_path / "lines.jsonl").write_text('{"content": "x"}\n' * 3)
    with pytest.raises(ValueError, match=r"no documents .* 3 malformed \(first: lines\.jsonl@0"):
        prep(tmp_path / "lines.jsonl", tmp_path / "data")


def test_bad_arguments_are_told_together(tmp_path: Path) -> None:
    arguments = PrepArguments(
        inputs=["x"],
        output="y",
        val_fraction=1.5,
        vocab_size=256,
        workers=0,
        seed=-1,
        eod_token="</s>",
    )
    with pytest.raises(ValueError, match=r"--val-fraction 1\.5") as caught:
        prepare(arguments, Silent())
    for flag in ("--seed -1", "--vocab-size 256", "--workers 0", "--eod-token '</s>'"):
        assert flag in str(caught.value)
    both = PrepArguments(inputs=["x"], output="y", tokenizer="z.json", vocab_size=300)
    with pytest.raises(ValueError, match=r"--vocab-size 300 has no effect with --tokenizer"):
        both.check()


def test_a_large_corpus_trains_the_tokenizer_on_evenly_spaced_parts(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    total = sum(path.stat().st_size for path in corpus.iterdir())

    def sampled(sample_bytes: int) -> tuple[int, list[int]]:
        arguments = PrepArguments(
            inputs=[str(corpus)],
            output="x",
            part_bytes=4000,
            tokenizer_sample_bytes=sample_bytes,
        )
        recipe = Recipe(arguments, Silent())
        return len(recipe.parts), [recipe.parts.index(part) for part in recipe.tokenizer_parts()]

    count, chosen = sampled(total)
    assert chosen == list(range(count))
    assert sampled(total // 2)[1] == [k * count // (count // 2) for k in range(count // 2)]
    assert sampled(1)[1] == [0]
    prep(corpus, tmp_path / "few", tokenizer_sample_bytes=total // 3)
    few = (tmp_path / "few" / "tokenizer.json").read_bytes()
    assert few != (folder / "tokenizer.json").read_bytes()


def test_a_dry_run_foretells_the_real_one(folder: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = PrepArguments(
        inputs=[str(corpus)],
        output=str(tmp_path / "new"),
        vocab_size=400,
        val_fraction=0.25,
        part_bytes=4000,
    )
    plan = dry_run(arguments, Silent())
    assert not (tmp_path / "new").exists()
    assert plan.state == "empty"
    splits = DataManifest.load(folder).splits
    assert plan.documents == {name: split.documents for name, split in splits.items()}
    assert plan.text_bytes == {name: split.bytes for name, split in splits.items()}
    assert plan.skipped == {"empty": 1, "undecodable": 1}
    used = sum(
        (folder / f"{name}{suffix}").stat().st_size
        for name in splits
        for suffix in (".bin", ".idx")
    )
    assert plan.disk_bytes / 2 < used < plan.disk_most_bytes
    there = PrepArguments(**{**vars(arguments), "output": str(folder)})
    assert dry_run(there, Silent()).state == "finished: nothing to do"
    other = PrepArguments(**{**vars(arguments), "output": str(folder), "seed": 3})
    assert dry_run(other, Silent()).state == "another prep (seed was 0, now 3): needs --overwrite"


def test_two_preps_in_one_folder_do_not_mix(corpus: Path, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another `moesys prep` is at work here"):
        prep(corpus, tmp_path)
    os.close(handle)
    prep(corpus, tmp_path)


def test_a_missing_writer_is_told_before_the_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    with pytest.raises(ValueError, match="needs megatron-core"):
        prep(corpus, tmp_path / "data")
    assert not (tmp_path / "data" / ".prep").exists()
