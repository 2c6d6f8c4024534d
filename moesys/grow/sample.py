"""Token sequences that experts are judged by: of texts, or of held-out data."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesys.config.schema import RunConfig
from moesys.data.indexed import IndexedTokens
from moesys.data.loader import IGNORED_TARGET, EvalBatches
from moesys.data.tokenizer import tokenizer_of


def of_texts(config: RunConfig, texts: Sequence[Path], max_tokens: int) -> Iterator[Tensor]:
    """int64 [1, S], S at most data.seq_len: the first `max_tokens` tokens of each. Raises ValueError for what cannot be read."""
    tokenizer = tokenizer_of(config.data)
    for path in texts:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {path} cannot be read: {error}") from error
        ids = tokenizer.encode(text).ids[:max_tokens]
        for first in range(0, len(ids), config.data.seq_len):
            yield torch.tensor([ids[first : first + config.data.seq_len]])


def of_data(config: RunConfig, folders: Sequence[Path], max_tokens: int) -> Iterator[Tensor]:
    """int64 [1, S]: samples spread evenly over the validation splits of folders of `moesys prep`, equally many of each."""
    seq_len = config.data.seq_len
    for folder in folders:
        batches = EvalBatches(
            IndexedTokens(folder / "val", config.model.vocab_size),
            seq_len=seq_len,
            micro_batch_samples=1,
            dp_rank=0,
            dp_size=1,
            eval_tokens=max(1, max_tokens // len(folders) // seq_len) * seq_len,
        )
        for batch in batches:
            yield batch.input_ids_BS[batch.target_ids_BS != IGNORED_TARGET][None]
