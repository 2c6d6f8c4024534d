"""Whether a run fits its GPUs, before it is queued; and if not, the cheapest changes that would make it fit, by trying them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, islice

from moesys.config.errors import Problem
from moesys.config.layout import allowed_degrees, dims_or_none, find_layout_problems
from moesys.config.pipeline import find_pipeline_problems
from moesys.config.schema import Recompute, RunConfig
from moesys.parallel.dims import ParallelDims, parallel_dims
from moesys.plan.memory import RankMemory, memory_by_stage
from moesys.plan.pipeline import layers_of_stages

GIB = 2**30
_LEVELS: Mapping[Recompute, int] = {"none": 0, "moe": 2, "attention": 2, "selective": 3, "layer": 6}
"""What a level costs; also the order of levels."""
_ZERO_COSTS = (0, 1, 1, 3)
_AXIS_COSTS = {"ep": 2, "tp": 3, "pp": 4, "etp": 5}
"""Of twice the ranks."""
_DOUBLINGS = 3
_MOST_CHANGES = 3
_MOST_TRIED = 500
_SUGGESTIONS = 3


def plan_memory(
    config: RunConfig, dims: ParallelDims, expert_load: float = 1.0
) -> list[RankMemory]:
    """Of each pipeline rank, on a GPU. `expert_load`: the fullest rank's rows over the even share."""
    return _plan(config, dims, expert_load, {})


def _plan(
    config: RunConfig, dims: ParallelDims, expert_load: float, stages_of: dict[int, list[list[int]]]
) -> list[RankMemory]:
    """`stages_of` degrees of pp that were cut before, which takes its time."""
    pp = config.parallel.pp
    if pp not in stages_of:
        stages_of[pp] = layers_of_stages(config.model, config.parallel, config.data.seq_len)
    axes = dims.dense_axes | dims.expert_axes
    return memory_by_stage(config, axes, stages_of[pp], expert_load=expert_load)


def memory_problems(
    config: RunConfig, dims: ParallelDims, gpu_memory_gib: float, expert_load: float = 1.0
) -> list[Problem]:
    """The problem of a configuration without others that does not fit GPUs of so much memory; [] if it fits."""
    stages = plan_memory(config, dims, expert_load)
    worst = max(range(len(stages)), key=lambda stage: stages[stage].total)
    memory = stages[worst]
    if memory.total <= gpu_memory_gib * GIB:
        return []
    found = [
        f"{change.text} ({change.total / GIB:.1f} GiB)"
        for change in islice(_fitting(config, dims, gpu_memory_gib, expert_load), _SUGGESTIONS)
    ]
    where = f"the ranks of pipeline stage {worst}" if len(stages) > 1 else "a rank"
    most = sorted(memory.terms.items(), key=lambda term: -term[1])[:3]
    return [
        Problem(
            key="memory",
            rule=f"needs {memory.total / GIB:.1f} GiB on {where} ("
            + ", ".join(f"{name} {nbytes / GIB:.1f}" for name, nbytes in most)
            + f" GiB), which must be at most the {gpu_memory_gib:g} GiB of a GPU",
            fix=f"use {', or '.join(found)}"
            if found
            else f"start more than {dims.world_size} ranks, or use a smaller model: no {_MOST_CHANGES} changes of "
            "parallel, train.recompute and train.micro_batch_tokens make it fit",
        )
    ]


@dataclass(frozen=True, kw_only=True)
class _Change:
    """Keys of parallel and train with new values."""

    parallel: Mapping[str, object]
    train: Mapping[str, object]
    cost: int
    total: int = 0
    """Bytes of the worst rank, once tried."""

    @property
    def text(self) -> str:
        keys = {f"parallel.{k}": v for k, v in self.parallel.items()}
        keys |= {f"train.{k}": v for k, v in self.train.items()}
        return " with ".join(f"{key}={value}" for key, value in keys.items())

    def of(self, config: RunConfig) -> RunConfig:
        return replace(
            config,
            parallel=replace(config.parallel, **self.parallel),  # type: ignore[arg-type]
            train=replace(config.train, **self.train),  # type: ignore[arg-type]
        )


def _fitting(
    config: RunConfig, dims: ParallelDims, gpu_memory_gib: float, expert_load: float
) -> Iterator[_Change]:
    """Those of as few keys as help, the cheapest first; none of the same keys as one before it."""
    seen: list[set[str]] = []
    stages_of: dict[int, list[list[int]]] = {}
    for change in islice(_changes(config, dims), _MOST_TRIED):
        keys = {*change.parallel, *change.train}
        if seen and len(keys) > len(seen[0]):
            return
        changed = change.of(config)
        if keys in seen or not _is_valid(changed, dims.world_size):
            continue
        dims_then = parallel_dims(changed.parallel, dims.world_size)
        total = max(s.total for s in _plan(changed, dims_then, expert_load, stages_of))
        if total <= gpu_memory_gib * GIB:
            seen.append(keys)
            yield replace(change, total=total)


def _changes(config: RunConfig, dims: ParallelDims) -> Iterator[_Change]:
    single = list(_single_changes(config, dims))
    for count in range(1, _MOST_CHANGES + 1):
        together = [
            _Change(
                parallel={k: v for part in parts for k, v in part.parallel.items()},
                train={k: v for part in parts for k, v in part.train.items()},
                cost=sum(part.cost for part in parts),
            )
            for parts in combinations(single, count)
            if len({k for part in parts for k in (*part.parallel, *part.train)}) == count
        ]
        yield from sorted(together, key=lambda change: change.cost)


def _single_changes(config: RunConfig, dims: ParallelDims) -> Iterator[_Change]:
    parallel, train = config.parallel, config.train
    if dims.dp * dims.cp > 1:
        for zero in range(parallel.zero + 1, len(_ZERO_COSTS)):
            yield _Change(parallel={"zero": zero}, train={}, cost=_ZERO_COSTS[zero])
    levels = list(_LEVELS)
    for level in levels[levels.index(train.recompute) + 1 :]:
        yield _Change(parallel={}, train={"recompute": level}, cost=_LEVELS[level])
    tokens, halvings = train.micro_batch_tokens // 2, 1
    while tokens >= config.data.seq_len:
        yield _Change(parallel={}, train={"micro_batch_tokens": tokens}, cost=1 + halvings)
        tokens, halvings = tokens // 2, halvings + 1
    for axis, cost in _AXIS_COSTS.items():
        given = getattr(parallel, axis)
        allowed = allowed_degrees(config, dims.world_size, axis)
        for doublings in range(1, _DOUBLINGS + 1):
            if (degree := given << doublings) in allowed:
                yield _Change(parallel={axis: degree}, train={}, cost=cost * doublings)


def _is_valid(config: RunConfig, world_size: int) -> bool:
    if dims_or_none(config.parallel, world_size) is None:
        return False
    problems = (find_layout_problems, find_pipeline_problems)
    return all(next(iter(find(config, world_size)), None) is None for find in problems)
