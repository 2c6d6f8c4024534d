"""Samples of a token stream, in one endless order that every rank agrees on.

The stream is cut every `seq_len` tokens. Sample k reads tokens k*S .. k*S + S: the first S are its
inputs, the last S its targets, so each token but the first is a target exactly once per epoch.
An epoch is a permutation of the samples (moesys.data.order); epochs follow each other without a gap,
so a step may straddle two.

Step s takes positions [s*G, (s+1)*G) of that order, whatever the number of ranks and the micro-batch.
Sample i of a step goes to micro-step m, rank r, row j by `i = (m*P + r)*B + j`: micro-step major,
then rank, then row.

Shapes: N tokens in the stream, B samples per micro-batch, S tokens per sample, G samples per step,
P data-parallel ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesys.data.indexed import IndexedTokens
from moesys.data.order import permute
from moesys.ops.cross_entropy import IGNORED_TARGET


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank feeds to one forward."""

    input_ids_BS: Tensor
    """int64, on the CPU."""
    target_ids_BS: Tensor
    """int64: the token after each input, or IGNORED_TARGET where there is none (evaluation only)."""
    document_ids_BS: Tensor | None = None
    """int64, if asked for: the document of each input, numbered through the stream."""


class TokenLoader:
    """Training batches of one rank.

    Args:
        tokens: the training stream.
        seq_len: tokens per sample (S).
        global_batch_samples: samples per step over all ranks (G), a multiple of B * P.
        micro_batch_samples: samples per forward on one rank (B).
        dp_rank, dp_size: this rank among those that read different samples (P of them).
        seed: fixes the order of every epoch, if `shuffle`.
        shuffle: False reads the stream front to back in every epoch.
        with_documents: say which document each token belongs to.

    Memory: one step of this rank; the order is computed, not stored. Up to 2**62 samples.

    Raises:
        ValueError: sizes that do not fit together, or fewer samples than one step needs; all at once.
    """

    def __init__(
        self,
        tokens: IndexedTokens,
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
        self.num_samples = (len(tokens) - 1) // seq_len if seq_len > 0 else 0
        """Samples per epoch. The last (N - 1) % S tokens of the stream are not read."""
        if seq_len > 0 and self.num_samples < max(1, global_batch_samples):
            problems.append(
                f"{tokens.bin_path}: its {len(tokens)} tokens make {self.num_samples} samples of {seq_len} + 1, "
                f"fewer than one step of {global_batch_samples}: "
                "use more text, a smaller data.seq_len or a smaller train.global_batch_tokens"
            )
        _raise(problems)
        self._tokens = tokens
        self._seq_len = seq_len
        self._global_batch_samples = global_batch_samples
        self._seed = seed
        self._shuffle = shuffle
        self._with_documents = with_documents
        self._micro_steps = global_batch_samples // per_micro_step
        # Rows of this rank inside a step, [micro_steps, B].
        first = (np.arange(self._micro_steps) * dp_size + dp_rank) * micro_batch_samples
        self._rows = first[:, None] + np.arange(micro_batch_samples)
        self.consumed_samples = 0
        """Samples read by all ranks together since the start of the run."""

    @property
    def epoch(self) -> int:
        """The epoch that the next sample belongs to, from 0."""
        return self.consumed_samples // self.num_samples

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step, in order. Every rank gets equally many."""
        batches = self.step_at(self.consumed_samples)
        self.consumed_samples += self._global_batch_samples
        return batches

    def step_at(self, first_sample: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step whose batch begins at this position; the loader stays where it is."""
        batches = []
        for rows_B in self._rows:
            samples_B = self.samples_at(first_sample + rows_B)
            starts_B = samples_B * self._seq_len
            batch = _shifted(_read(self._tokens, starts_B, self._seq_len + 1))
            if self._with_documents:
                batch = _told_documents(batch, self._tokens, starts_B)
            batches.append(batch)
        return batches

    def samples_at(self, positions_B: np.ndarray) -> np.ndarray:
        """Which samples stand at these positions of the endless order, int64 [B]."""
        epochs_B, places_B = np.divmod(positions_B.astype(np.int64), self.num_samples)
        if not self._shuffle:
            return places_B
        samples_B = np.empty_like(places_B)
        for epoch in np.unique(epochs_B):
            here = epochs_B == epoch
            samples_B[here] = permute(
                places_B[here], self.num_samples, seed=self._seed, epoch=int(epoch)
            )
        return samples_B

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands in the order, and what the order depends on. Plain JSON values."""
        return {"consumed_samples": self.consumed_samples, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state["consumed_samples"]` samples.

        dp_size, the micro-batch and the global batch may differ from the run that saved it.

        Raises:
            ValueError: the saved run read another stream or another order; names every difference.
        """
        problems = []
        for key, ours in self._identity().items():
            if key not in state:
                problems.append(f"data state has no {key!r}: it was not written by this loader")
            elif state[key] != ours:
                problems.append(
                    f"{key} is {ours!r} here but {state[key]!r} in the checkpoint: {_RESUME_FIX[key]}"
                )
        consumed = state.get("consumed_samples")
        if isinstance(consumed, bool) or not isinstance(consumed, int) or consumed < 0:
            problems.append(f"consumed_samples must be an integer >= 0, is {consumed!r}")
        _raise(problems)
        assert isinstance(consumed, int)
        self.consumed_samples = consumed

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset": self._tokens.fingerprint,
            "num_tokens": len(self._tokens),
            "seq_len": self._seq_len,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }


_RESUME_FIX = {
    "dataset": "point data.path at the data the run began with, or start a new run",
    "num_tokens": "point data.path at the data the run began with, or start a new run",
    "seq_len": "set data.seq_len back, or start a new run",
    "seed": "set run.seed back, or start a new run",
    "shuffle": "set data.shuffle back, or start a new run",
}


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
        _raise(problems)
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
                batch = _told_documents(batch, self._tokens, starts_B)
            yield batch


def _read(tokens: IndexedTokens, starts_B: np.ndarray, length: int) -> np.ndarray:
    """int64 [B, length]: `length` tokens from each start."""
    windows = np.empty((starts_B.size, length), dtype=np.int64)
    for row, start in enumerate(starts_B.tolist()):
        windows[row] = tokens.tokens_N[start : start + length]
    return windows


def _told_documents(batch: MicroBatch, tokens: IndexedTokens, starts_B: np.ndarray) -> MicroBatch:
    """The batch with the document of each of its inputs, of which row b begins at token starts_B[b]."""
    positions_BS = starts_B[:, None] + np.arange(batch.input_ids_BS.shape[1])
    ids_BS = np.searchsorted(tokens.document_offsets, positions_BS, side="right") - 1
    return replace(batch, document_ids_BS=torch.from_numpy(ids_BS.astype(np.int64)))


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


def _raise(problems: list[str]) -> None:
    if problems:
        head = (
            "data loader: "
            if len(problems) == 1
            else f"data loader: {len(problems)} problems\n  - "
        )
        raise ValueError(head + "\n  - ".join(problems))
