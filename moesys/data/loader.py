"""Samples of token streams, in one endless order that every rank agrees on.

A stream is cut every `seq_len` tokens. Sample k reads tokens k*S .. k*S + S: the first S are its
inputs, the last S its targets, so each token but the first is a target exactly once per epoch.
They are read in the order of moesys.data.mixed_order.
Step s takes positions [s*G, (s+1)*G) of that order, whatever the number of ranks and the micro-batch.
Sample i of a step goes to micro-step m, rank r, row j by `i = (m*P + r)*B + j`: micro-step major,
then rank, then row.

Shapes: N tokens in a stream, B samples per micro-batch, S tokens per sample, G samples per step,
P data-parallel ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moesys.data.indexed import IndexedTokens
from moesys.data.mix import Mix
from moesys.data.mixed_order import MixedOrder, raise_problems
from moesys.data.source import Source, SourceOrder
from moesys.ops.cross_entropy import IGNORED_TARGET


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one data rank feeds to one forward: samples of equal length."""

    input_ids_BS: Tensor
    """int64, on the CPU."""
    target_ids_BS: Tensor
    """int64: the token after each input, or IGNORED_TARGET where there is none (evaluation only)."""
    document_ids_BS: Tensor | None = None
    """int64, if asked for: the document of each input, numbered through its stream."""


class TokenLoader(MixedOrder):
    """Training batches of one rank.

    Args:
        sources: one, or several with names and weights.
        seq_len: tokens per sample (S).
        global_batch_samples: samples per step over all ranks (G), a multiple of B * P.
        micro_batch_samples: samples per forward on one rank (B).
        dp_rank, dp_size: this rank among those that read different samples (P of them).
        seed: fixes the order of every epoch, if `shuffle`.
        shuffle: False reads the streams front to back in every epoch.
        with_documents: say which document each token belongs to.

    Memory: one step of this rank, and what `mix` keeps; the order is computed, not stored. Up to 2**62 samples.

    Raises:
        ValueError: sizes that do not fit together, or fewer samples than one step needs; all at once.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seq_len: int,
        global_batch_samples: int,
        micro_batch_samples: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool,
        with_documents: bool = False,
    ) -> None:
        problems = _problems(seq_len, micro_batch_samples, dp_rank, dp_size)
        per_micro_step = micro_batch_samples * dp_size
        if not problems and (global_batch_samples < 1 or global_batch_samples % per_micro_step):
            problems.append(
                f"global_batch_samples={global_batch_samples} must be a positive multiple of "
                f"micro_batch_samples * dp_size = {micro_batch_samples} * {dp_size} = {per_micro_step}: "
                f"use {max(1, round(global_batch_samples / per_micro_step)) * per_micro_step}"
            )
        weights_N = Mix.of([source.weight for source in sources]).weights_N
        for source, weight in zip(sources, weights_N, strict=True):
            num_samples = source.num_samples(seq_len) if seq_len > 0 else 0
            needed = max(1, int(global_batch_samples * weight))
            if seq_len > 0 and num_samples < needed:
                step = "one step of" if len(sources) == 1 else f"its {needed} of a step of"
                problems.append(
                    f"{source.tokens.bin_path}: its {len(source.tokens)} tokens make {num_samples} samples of "
                    f"{seq_len} + 1, fewer than {step} {global_batch_samples}: "
                    "use more text, a smaller data.seq_len or a smaller train.global_batch_tokens"
                )
        raise_problems(problems)
        orders = [
            SourceOrder(source, num_samples=source.num_samples(seq_len), seed=seed, shuffle=shuffle)
            for source in sources
        ]
        super().__init__(sources, orders, {"seq_len": seq_len, "seed": seed, "shuffle": shuffle})
        self._seq_len = seq_len
        self._global_batch_samples = global_batch_samples
        self._with_documents = with_documents
        self._micro_steps = global_batch_samples // per_micro_step
        # Rows of this rank inside a step, [micro_steps, B].
        first = (np.arange(self._micro_steps) * dp_size + dp_rank) * micro_batch_samples
        self._rows = first[:, None] + np.arange(micro_batch_samples)

    @property
    def consumed_tokens(self) -> int:
        """Of `consumed_samples`."""
        return self.consumed_samples * self._seq_len

    def tokens_of_sources(self) -> dict[str, int]:
        """Of `consumed_tokens` those of each source, by name."""
        read = self.consumed_of_sources()
        return {name: count * self._seq_len for name, count in read.items()}

    def samples_in(self, num_tokens: int) -> float:
        """So many tokens are."""
        return num_tokens / self._seq_len

    def close(self) -> None:
        """Nothing is open but memory maps."""

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step, in order. Every rank gets equally many."""
        batches = self.step_at(self.consumed_samples)
        self.consumed_samples += self._global_batch_samples
        return batches

    def step_at(self, first_sample: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step whose batch begins at this position; the loader stays where it is."""
        return [self._batch_at(first_sample + rows_B) for rows_B in self._rows]

    def _batch_at(self, positions_B: np.ndarray) -> MicroBatch:
        sources_B, places_B = self.mix.at(positions_B.astype(np.int64))
        windows = np.empty((positions_B.size, self._seq_len + 1), dtype=np.int64)
        document_ids_BS = np.empty((positions_B.size, self._seq_len), dtype=np.int64)
        for index in np.unique(sources_B):
            here, tokens = sources_B == index, self.sources[index].tokens
            starts = self.orders[index].samples_at(places_B[here]) * self._seq_len
            windows[here] = _read(tokens, starts, self._seq_len + 1)
            if self._with_documents:
                document_ids_BS[here] = _document_ids(tokens, starts, self._seq_len)
        batch = _shifted(windows)
        return _told_documents(batch, document_ids_BS) if self._with_documents else batch


class EvalBatches:
    """One pass over held-out tokens, the same number of batches on every rank.

    Exactly `num_targets` = min(eval_tokens, N - 1) targets are covered, each by one rank, once; with
    eval_tokens < N - 1 they are whole windows spread evenly over the stream (but for a shorter last one).
    Experts may live on other ranks, so every rank runs `len(self)` forwards of one shape [B, S]: what
    is left over is padded with inputs 0 and targets IGNORED_TARGET, whole batches of them if need be.

    Args:
        eval_tokens: targets over all ranks; 0 = all.
        Others as in TokenLoader.

    Raises:
        ValueError: sizes that do not fit, or a stream without a single target; all at once.
    """

    def __init__(
        self,
        tokens: IndexedTokens,
        *,
        seq_len: int,
        micro_batch_samples: int,
        dp_rank: int,
        dp_size: int,
        eval_tokens: int = 0,
        with_documents: bool = False,
    ) -> None:
        problems = _problems(seq_len, micro_batch_samples, dp_rank, dp_size)
        if eval_tokens < 0:
            problems.append(f"train.eval_tokens={eval_tokens} must be >= 0: use 0 for all")
        if len(tokens) < 2:
            problems.append(
                f"{tokens.bin_path}: needs 2 tokens or more to have a target, holds {len(tokens)}"
            )
        raise_problems(problems)
        self.num_targets = min(eval_tokens or len(tokens) - 1, len(tokens) - 1)
        """Targets over all ranks and batches."""
        self._tokens = tokens
        self._seq_len = seq_len
        self._rows_per_batch = micro_batch_samples
        self._with_documents = with_documents
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._num_windows = -(-self.num_targets // seq_len)

    def __len__(self) -> int:
        """Batches per rank."""
        return -(-self._num_windows // (self._rows_per_batch * self._dp_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        available = -(-(len(self._tokens) - 1) // self._seq_len)
        for step in range(len(self)):
            first = (step * self._dp_size + self._dp_rank) * self._rows_per_batch
            windows = np.zeros((self._rows_per_batch, self._seq_len + 1), dtype=np.int64)
            targets_per_row = np.zeros(self._rows_per_batch, dtype=np.int64)
            starts_B = np.zeros(self._rows_per_batch, dtype=np.int64)
            for row, window in enumerate(range(first, first + self._rows_per_batch)):
                if window >= self._num_windows:
                    break
                count = min(self._seq_len, self.num_targets - window * self._seq_len)
                start = window * available // self._num_windows * self._seq_len
                windows[row, : count + 1] = self._tokens.tokens_N[start : start + count + 1]
                targets_per_row[row], starts_B[row] = count, start
            batch = _shifted(windows)
            padding_BS = np.arange(self._seq_len) >= targets_per_row[:, None]
            batch.target_ids_BS[torch.from_numpy(padding_BS)] = IGNORED_TARGET
            if self._with_documents:
                ids_BS = _document_ids(self._tokens, starts_B, self._seq_len)
                batch = _told_documents(batch, ids_BS)
            yield batch


def _read(tokens: IndexedTokens, starts_B: np.ndarray, length: int) -> np.ndarray:
    """int64 [B, length]: `length` tokens from each start."""
    windows = np.empty((starts_B.size, length), dtype=np.int64)
    for row, start in enumerate(starts_B.tolist()):
        windows[row] = tokens.tokens_N[start : start + length]
    return windows


def _document_ids(tokens: IndexedTokens, starts_B: np.ndarray, length: int) -> np.ndarray:
    """int64 [B, length]: the document of each of `length` tokens from each start."""
    positions_BS = starts_B[:, None] + np.arange(length)
    return np.searchsorted(tokens.document_offsets, positions_BS, side="right") - 1


def _told_documents(batch: MicroBatch, document_ids_BS: np.ndarray) -> MicroBatch:
    return replace(batch, document_ids_BS=torch.from_numpy(document_ids_BS.astype(np.int64)))


def _shifted(windows: np.ndarray) -> MicroBatch:
    """Windows of S + 1 tokens as inputs and targets; each contiguous, and not sharing memory."""
    return MicroBatch(
        input_ids_BS=torch.from_numpy(windows[:, :-1].copy()),
        target_ids_BS=torch.from_numpy(windows[:, 1:].copy()),
    )


def _problems(seq_len: int, micro_batch_samples: int, dp_rank: int, dp_size: int) -> list[str]:
    problems = []
    for name, value in (
        ("seq_len", seq_len),
        ("micro_batch_samples", micro_batch_samples),
        ("dp_size", dp_size),
    ):
        if value < 1:
            problems.append(f"{name}={value} must be >= 1")
    if dp_size >= 1 and not 0 <= dp_rank < dp_size:
        problems.append(f"dp_rank={dp_rank} must lie in [0, dp_size={dp_size})")
    return problems
