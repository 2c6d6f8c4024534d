"""Byte-level BPE: train one, load one, and know how many bytes each token stands for.

Only byte-level tokenizers are taken (GPT-2, Llama 3, Qwen, DeepSeek ... are): with them every text has
tokens, and tokens count back to bytes exactly, which bits per byte rests on.

Shapes: V ids of the vocabulary.
"""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moesys.config.schema import DataConfig

EOD_TOKEN = "<|endoftext|>"
SMALLEST_VOCAB_SIZE = 257
"""256 bytes and the end of a document."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's word pattern; EOD_TOKEN has id 0, bytes 1..256.

    The vocabulary is smaller than asked for if the texts do not hold that many pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, set to read the spelling of a special token in a text as plain text.

    Kept between calls until the file changes: a large one takes half a second to read.
    """
    status = os.stat(path)
    return _load(str(path), status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=2)
def _load(path: str, _mtime_ns: int, _inode: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        fix = "give a Hugging Face fast tokenizer"
        raise ValueError(f"{path}: not a tokenizer.json ({error}): {fix}") from error
    # Otherwise a document that quotes <|endoftext|> would end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """The one that all sources have. Raises ValueError where a folder of `moesys prep` is not."""
    path = Path(next(iter(data.folders.values())), "tokenizer.json")
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: work where the run's data is")
    return load_tokenizer(path)


def eod_id(tokenizer: Tokenizer, eod_token: str, path: str | Path) -> int:
    """The id of the token put after each document.

    Raises:
        ValueError: the vocabulary does not have it.
    """
    found = tokenizer.token_to_id(eod_token)
    if found is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        raise ValueError(
            f"{path}: no token {eod_token!r} to end documents with: name one with --eod-token "
            f"(its special tokens: {', '.join(special[:12]) or 'none'})"
        )
    return found


def token_bytes(tokenizer: Tokenizer, path: str | Path) -> np.ndarray:
    """UTF-8 bytes that each id stands for, int32 [V]; 0 for special tokens and unused ids.

    Raises:
        ValueError: the tokenizer is not byte-level.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    counts_V = np.zeros(max(vocab.values()) + 1, dtype=np.int32)
    for token, token_id in vocab.items():
        if token_id in added:
            counts_V[token_id] = 0 if added[token_id].special else len(token.encode())
        elif alphabet.issuperset(token):
            counts_V[token_id] = len(token)  # one character of this alphabet is one byte
        else:
            raise ValueError(
                f"{path}: token {token_id} ({token!r}) is not byte-level, so bytes cannot be counted: "
                "use a byte-level BPE tokenizer, or leave --tokenizer out to train one"
            )
    return counts_V


def normalized(tokenizer: Tokenizer, text: str) -> str:
    """The text as the tokenizer sees it (some compose accents first); its bytes are what is counted."""
    return tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
