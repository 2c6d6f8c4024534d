"""A layout for a run that goes on with more or fewer ranks: as near as possible to the one that was configured.

The batch stays what it is, in tokens and in samples, so that a step is the same step on any number of ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from moesys.config.schema import ParallelConfig, RunConfig

SHRUNK = ("ep", "etp", "cp", "pp", "tp")
"""First to last. Fewer expert ranks only hold more experts each; a tensor degree is what makes a layer fit."""


def elastic_layout(
    config: RunConfig, world_size: int, is_allowed: Callable[[RunConfig, int], bool]
) -> RunConfig | None:
    """`config` with degrees and a micro-batch that work on `world_size` ranks; None if there are none.

    Degrees stay if they work; else the first of SHRUNK that must is made smaller, then the next one too. dp takes
    what is left over. The micro-batch stays if the batch divides, else it is the largest that works, smaller
    than before: memory was planned for that. What works, `is_allowed(config, world_size)` says.
    """
    for parallel in _layouts(config.parallel):
        if world_size % (parallel.pp * parallel.cp * parallel.tp):
            continue
        dp = world_size // (parallel.pp * parallel.cp * parallel.tp)
        parallel = replace(parallel, dp_shard=_dp_shard(parallel, dp))
        for micro_batch_tokens in _micro_batches(config, dp):
            train = replace(config.train, micro_batch_tokens=micro_batch_tokens)
            found = replace(config, parallel=parallel, train=train)
            if is_allowed(found, world_size):
                return found
    return None


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What `elastic_layout` changed, as "parallel.ep 4 -> 2"."""
    found = []
    for section, keys in (
        ("parallel", ("pp", "cp", "tp", "ep", "etp", "dp_shard")),
        ("train", ("micro_batch_tokens",)),
    ):
        for key in keys:
            old, new = getattr(getattr(before, section), key), getattr(getattr(after, section), key)
            if old != new:
                found.append(f"{section}.{key} {old} -> {new}")
    return found


def _layouts(parallel: ParallelConfig) -> Iterator[ParallelConfig]:
    """Divisors of the degrees, the first of SHRUNK varying fastest, each from its own value down."""

    def vary(axes: tuple[str, ...], chosen: ParallelConfig) -> Iterator[ParallelConfig]:
        if not axes:
            yield chosen
            return
        *rest, slowest = axes
        given = getattr(parallel, slowest)
        for degree in range(given, 0, -1):
            if given % degree == 0:
                yield from vary(tuple(rest), replace(chosen, **{slowest: degree}))

    return vary(SHRUNK, parallel)


def _micro_batches(config: RunConfig, dp: int) -> Iterator[int]:
    """Whole samples, of which the batch is a multiple on `dp` ranks, the configured size first; where batches are planned that alone."""
    seq_len, batch = config.data.seq_len, config.train.global_batch_tokens
    if config.batch.is_planned:
        yield config.train.micro_batch_tokens
        return
    for tokens in range(config.train.micro_batch_tokens, 0, -seq_len):
        if batch % (tokens * dp) == 0:
            yield tokens


def _dp_shard(parallel: ParallelConfig, dp: int) -> int | None:
    """The largest number of ranks, at most as configured, that divides dp."""
    given = parallel.dp_shard
    return given and next(n for n in range(min(given, dp), 0, -1) if dp % n == 0)
