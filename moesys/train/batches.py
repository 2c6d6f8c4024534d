"""What reads the data of a run: samples of equal length, or documents as sequences that a plan shares out."""

from collections.abc import Sequence
from pathlib import Path

from moesys.config.schema import RunConfig
from moesys.data.eval_sequences import EvalSequences
from moesys.data.indexed import IndexedTokens
from moesys.data.loader import EvalBatches, TokenLoader
from moesys.data.plan_ahead import PlanRequest
from moesys.data.sequence_loader import SequenceLoader
from moesys.data.source import Source
from moesys.plan.batch.cost import block_token_bytes, costs_of


def build_loader(config: RunConfig, dp_rank: int, dp_size: int) -> TokenLoader | SequenceLoader:
    """Of training text. Raises ValueError for files that are not as they should be."""
    sources = _sources(config)
    data, batch, train = config.data, config.batch, config.train
    if batch.is_planned:
        return SequenceLoader(
            sources,
            longest_tokens=data.seq_len,
            global_batch_tokens=train.global_batch_tokens,
            request=_request(config, dp_size),
            dp_rank=dp_rank,
            seed=config.run.seed,
            shuffle=data.shuffle,
            skips_empty=_skips_empty(config),
            mtp_depth=config.model.mtp_depth,
            multiple_of=config.parallel.tp,
            long_documents=batch.long_documents,
            empty_documents=batch.empty_documents,
            plan_ahead_steps=batch.plan_ahead_steps,
        )
    return TokenLoader(
        sources,
        seq_len=data.seq_len,
        global_batch_samples=train.global_batch_tokens // data.seq_len,
        micro_batch_samples=train.micro_batch_tokens // data.seq_len,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=config.run.seed,
        shuffle=data.shuffle,
        with_documents=data.mask_documents,
    )


def build_eval_batches(
    config: RunConfig, tokens: IndexedTokens, eval_tokens: int, dp_rank: int, dp_size: int
) -> EvalBatches | EvalSequences:
    """Of `eval_tokens` held-out tokens, 0 = all."""
    if config.batch.is_planned:
        return EvalSequences(
            tokens,
            longest_tokens=config.data.seq_len,
            batch_tokens=config.train.global_batch_tokens,
            request=_request(config, dp_size),
            dp_rank=dp_rank,
            eval_tokens=eval_tokens,
            multiple_of=config.parallel.tp,
            long_documents=config.batch.long_documents,
        )
    return EvalBatches(
        tokens,
        seq_len=config.data.seq_len,
        micro_batch_samples=config.train.micro_batch_tokens // config.data.seq_len,
        dp_rank=dp_rank,
        dp_size=dp_size,
        eval_tokens=eval_tokens,
        with_documents=config.data.mask_documents,
    )


def _sources(config: RunConfig) -> Sequence[Source]:
    folders = config.data.folders.items()
    return [
        Source(
            name=name,
            tokens=IndexedTokens(Path(path) / "train", config.model.vocab_size),
            weight=weight,
        )
        for (name, path), weight in zip(folders, config.data.weights, strict=True)
    ]


def _request(config: RunConfig, dp_size: int) -> PlanRequest:
    parallel = config.parallel
    return PlanRequest(
        policy=config.batch.policy,
        num_ranks=dp_size,
        capacity_tokens=config.train.micro_batch_tokens,
        costs=costs_of(config.model, flops_per_s=1e12),
        meets=parallel.exchanges_over_data or parallel.zero > 1,
        longest_tokens=config.data.seq_len,
        stages=parallel.pp,
        block_token_bytes=block_token_bytes(config.model, config.train.compute_bytes),
    )


def _skips_empty(config: RunConfig) -> bool:
    """Whether nothing that a rank does in a micro-step waits for the ranks that are in no ring with it."""
    parallel, balance = config.parallel, config.model.moe.balance
    counts = (balance.global_loss_coef, balance.device_loss_coef, balance.width_loss_coef)
    waits = parallel.exchanges_over_data or parallel.pp > 1 or parallel.zero or any(counts)
    return not waits
