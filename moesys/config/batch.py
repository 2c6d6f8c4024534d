"""The rules of `batch`, for documents as sequences. Pure."""

from collections.abc import Iterator

from moesys.config.batch_schema import BatchConfig
from moesys.config.bounds import in_range
from moesys.config.errors import Problem
from moesys.config.schema import RunConfig
from moesys.parallel.dims import ParallelDims, parallel_dims
from moesys.plan.batch.fit import least_ranks


def find_batch_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Of sizes that are at least 1, which the batch's own rules say."""
    batch, train, longest = config.batch, config.train, config.data.seq_len
    yield from in_range("batch.plan_ahead_steps", batch.plan_ahead_steps, 0)
    if not batch.is_planned or min(longest, train.micro_batch_tokens) < 1:
        return
    if longest > train.global_batch_tokens >= 1:
        yield Problem(
            key="train.global_batch_tokens",
            given=train.global_batch_tokens,
            rule=f"must be at least data.seq_len={longest}: with batch.policy={batch.policy} a step has whole sequences",
            fix=f"use {longest} or more, or a smaller data.seq_len",
        )
    yield from _context(config)
    try:
        dims = parallel_dims(config.parallel, world_size)
    except ValueError:
        return  # the degrees' own problem is told
    yield from _memory(config, dims)


def _memory(config: RunConfig, dims: ParallelDims) -> Iterator[Problem]:
    """All data ranks together have it for the longest sequence."""
    capacity, longest = config.train.micro_batch_tokens, config.data.seq_len
    least = least_ranks(longest, capacity)
    if least > dims.dp:
        yield Problem(
            key="data.seq_len",
            given=longest,
            rule=f"is the most tokens of a sequence, which lies on {least} ranks of train.micro_batch_tokens={capacity}, and "
            f"there are dp={dims.dp} data ranks",
            fix=f"use {dims.dp * (capacity - 1)} or less, or a larger train.micro_batch_tokens, or more data ranks",
        )


def _context(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.cp > 1:
        yield Problem(
            key="batch.policy",
            given=config.batch.policy,
            rule=f"lays a sequence over any number of data ranks, and parallel.cp={config.parallel.cp} over a fixed one",
            fix="use parallel.cp=1, or batch.policy=samples",
        )


def batch_warnings(config: RunConfig) -> Iterator[str]:
    """Options that nothing will read."""
    batch = config.batch
    if batch.is_planned:
        if config.data.mask_documents:
            yield (
                f"data.mask_documents=true has no effect with batch.policy={batch.policy}: a document is a sequence"
            )
        return
    for key, field in BatchConfig.__dataclass_fields__.items():
        if key != "policy" and (value := getattr(batch, key)) != field.default:
            yield f"batch.{key}={value} has no effect with batch.policy=samples"
