"""Byte-level tokenizers: every text has tokens, and tokens count back to bytes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from moesys.data.tokenizer import (
    EOD_TOKEN,
    eod_id,
    load_tokenizer,
    normalized,
    token_bytes,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat, the cat sat", "über die Brücke 中文 中文", "x = 1\n    y = 2\n"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 280).save(str(path))
    return str(path)


def test_training_gives_the_same_file_again(tmp_path: Path, trained: str) -> None:
    train_tokenizer(TEXTS, 280).save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == Path(trained).read_bytes()
    tokenizer = load_tokenizer(trained)
    assert tokenizer.get_vocab_size() == 280
    assert eod_id(tokenizer, EOD_TOKEN, trained) == 0


@given(st.text(st.characters(codec="utf-8")))
def test_tokens_of_any_text_count_its_bytes_and_decode_to_it(trained: str, text: str) -> None:
    tokenizer = load_tokenizer(trained)
    bytes_V = token_bytes(tokenizer, trained)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert sum(int(bytes_V[i]) for i in ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_text_that_quotes_the_end_token_does_not_end_there(trained: str) -> None:
    tokenizer = load_tokenizer(trained)
    text = f"as in GPT-2, {EOD_TOKEN} ends a document"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert 0 not in ids
    assert int(token_bytes(tokenizer, trained)[ids].sum()) == len(text)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 280).save(str(path))
    assert load_tokenizer(str(path)).get_vocab_size() == 280
    train_tokenizer(TEXTS, 270).save(str(tmp_path / "new.json"))
    (tmp_path / "new.json").replace(path)
    assert load_tokenizer(str(path)).get_vocab_size() == 270


def test_added_tokens_that_are_text_count_and_special_ones_do_not(trained: str) -> None:
    tokenizer = Tokenizer.from_file(trained)
    tokenizer.add_tokens([AddedToken("grüß", normalized=False)])
    tokenizer.add_special_tokens(["<|pad|>"])
    bytes_V = token_bytes(tokenizer, trained)
    assert bytes_V[tokenizer.token_to_id("grüß")] == 6
    assert bytes_V[tokenizer.token_to_id("<|pad|>")] == 0
    assert bytes_V.size == 282


def test_a_tokenizer_that_composes_accents_counts_what_it_sees(trained: str) -> None:
    tokenizer = Tokenizer.from_file(trained)
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    seen = normalized(tokenizer, "u\u0308ber")
    assert seen == "\u00fcber"
    ids = tokenizer.encode("u\u0308ber", add_special_tokens=False).ids
    assert int(token_bytes(tokenizer, trained)[ids].sum()) == len(seen.encode()) == 5


def test_unfit_tokenizers_are_refused(tmp_path: Path, trained: str) -> None:
    words = Tokenizer(models.WordLevel({"zwölf ": 0, EOD_TOKEN: 1}, unk_token=EOD_TOKEN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"w\.json: token 0 \('zwölf '\) is not byte-level"):
        token_bytes(words, "w.json")
    with pytest.raises(
        ValueError, match=r"no token '</s>' .* --eod-token \(its special tokens: <\|end"
    ):
        eod_id(load_tokenizer(trained), "</s>", trained)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json: not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "t.json"))
