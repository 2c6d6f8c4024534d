"""Rules about the layout: how `parallel` factors the world, what its axes share out, the batches over it.

The equations are those of parallel/dims.py, asked here one after the other. A fix is searched, not derived: of the
values near the wrong one it names those that the rules accept.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from moesys.config.bounds import divisors, in_range, multiples_near, nearest
from moesys.config.errors import Problem
from moesys.config.schema import MemoryLayersConfig, MoEConfig, ParallelConfig, RunConfig
from moesys.parallel.dims import ParallelDims, parallel_dims

_DENSE = ("pp", "cp", "tp")
_EXPERT = ("ep", "etp")


def find_layout_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Every rule of this file that `config` breaks on `world_size` ranks."""
    parallel = config.parallel
    small = [p for axis, n in degrees(parallel).items() for p in in_range(f"parallel.{axis}", n, 1)]
    if parallel.dp_shard is not None:
        small += in_range("parallel.dp_shard", parallel.dp_shard, 1)
    yield from small
    if not small:
        yield from _equations(config, world_size)
        yield from _memory_tables(config)
        yield from _shared_lengths(config, world_size)
        yield from _ulysses(config)
    dense = replace(parallel, ep=1, etp=1, zero=0)
    yield from _batches(config, None if small else dims_or_none(dense, world_size))


def layout_warnings(config: RunConfig, world_size: int) -> Iterator[str]:
    """Options of `parallel` that nothing will read. The layout is one without problems."""
    parallel, dims = config.parallel, parallel_dims(config.parallel, world_size)
    if parallel.tp == 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel=false has no effect with parallel.tp=1"
    if parallel.cp == 1 and parallel.cp_attention != "ring":
        yield f"parallel.cp_attention={parallel.cp_attention} has no effect with parallel.cp=1"
    if parallel.zero and dims.dp_shard * dims.cp == 1:
        yield (
            f"parallel.zero={parallel.zero} has no effect: it shares out over "
            f"dp_shard={dims.dp_shard} * cp={dims.cp} = 1 rank"
        )


def degrees(parallel: ParallelConfig) -> dict[str, int]:
    """Of the axes whose degree is a key."""
    return {axis: getattr(parallel, axis) for axis in (*_DENSE, *_EXPERT)}


def dims_or_none(parallel: ParallelConfig, world_size: int) -> ParallelDims | None:
    try:
        return parallel_dims(parallel, world_size)
    except ValueError:
        return None


def allowed_degrees(config: RunConfig, world_size: int, axis: str) -> list[int]:
    """The values of parallel.`axis`, ascending, that the equations and the lengths shared out accept."""
    lengths = [length for length in _lengths(config) if length.axis == axis]
    return [
        degree
        for degree in divisors(world_size)
        if all(length.value % (length.unit * degree) == 0 for length in lengths)
        and (axis != "pp" or degree <= config.model.num_layers)
        and dims_or_none(replace(config.parallel, **{axis: degree}), world_size)
    ]


# --- The equations


def _equations(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Dense axes first; then what shards them; then experts, as far as these can be judged."""
    parallel = config.parallel
    if parallel.zero == 0 and parallel.dp_shard is not None:
        yield Problem(
            key="parallel.dp_shard",
            given=parallel.dp_shard,
            rule="must be null with parallel.zero=0, which shards nothing",
            fix="use parallel.dp_shard=null, or parallel.zero=1, 2 or 3",
        )

    def unfit(axes: Iterable[str], part: ParallelConfig) -> Problem | None:
        try:
            parallel_dims(part, world_size)
        except ValueError as error:
            return _unfit(config, world_size, tuple(axes), part, str(error))
        return None

    no_experts = replace(parallel, ep=1, etp=1)
    dense = unfit(_DENSE, replace(no_experts, zero=0))
    shard = None if dense else unfit(["dp_shard"], no_experts)
    yield from filter(None, [dense, shard])
    if dense:  # the ranks of a stage are unknown, but divide the world
        experts = unfit(_EXPERT, replace(parallel, pp=1, cp=1, tp=1, zero=0))
    elif shard:
        experts = unfit(_EXPERT, replace(parallel, dp_shard=None))
    else:
        experts = unfit((*_EXPERT, "dp_shard"), parallel)
    yield from filter(None, [experts])


def _unfit(
    config: RunConfig, world_size: int, axes: tuple[str, ...], part: ParallelConfig, said: str
) -> Problem:
    """The problem that ParallelDims `said` of `part`, which is `parallel` without axes judged elsewhere."""
    given = {axis: getattr(part, axis, None) or 1 for axis in axes}
    given = {axis: degree for axis, degree in given.items() if degree > 1}
    axis = next(
        (a for a in given if world_size % given[a]),
        max(given, key=lambda a: (a != "dp_shard", given[a])),
    )
    fixes = []
    for name in sorted(given, key=lambda a: a != axis):
        found = allowed_degrees(config, world_size, name) or allowed_degrees(
            replace(config, parallel=part), world_size, name
        )
        if near := nearest(found, given[name]):
            fixes.append(f"parallel.{name}={near}")
    if worlds := _worlds_near(config.parallel, world_size):
        fixes.append(f"start {worlds} ranks (--nproc)")
    simple = axis != "dp_shard" and world_size % given[axis]
    return Problem(
        key=f"parallel.{axis}",
        given=given[axis],
        rule=f"must divide the world size {world_size}" if simple else f"does not fit, {said}",
        fix="use " + ", or ".join(fixes),
    )


def _worlds_near(parallel: ParallelConfig, world_size: int) -> str:
    sizes = degrees(parallel) | {"dp_shard": parallel.dp_shard or 1}
    dense = math.prod(n for axis, n in sizes.items() if axis not in _EXPERT)
    expert = math.prod(n for axis, n in sizes.items() if axis in (*_EXPERT, "pp"))
    step = math.lcm(dense, expert)  # always a world; there may be nearer ones

    def fits(world: int) -> bool:
        return dims_or_none(parallel, world) is not None

    lower = next(filter(fits, range(world_size - 1, 0, -1)), None)
    upper = next(filter(fits, range(world_size + 1, world_size + step + 1)), None)
    return " or ".join(str(world) for world in (lower, upper) if world)


# --- What an axis shares out


@dataclass(frozen=True, kw_only=True)
class _Length:
    """A number of things that the ranks of one axis share out equally, in units."""

    key: str
    value: int
    axis: str
    unit: int = 1
    unit_words: str = ""
    """Of the unit, for the rule: "2 * "."""
    why: str = ""
    fits: Callable[[int], bool] = lambda _: True
    """Whether another value keeps the other rules about this key."""
    or_else: str = ""


def _lengths(config: RunConfig) -> list[_Length]:
    model, moe, train = config.model, config.model.moe, config.train
    cp, tp = config.parallel.cp, config.parallel.tp
    found = [
        # It divides num_heads: what divides it divides both.
        _Length(
            key="model.num_kv_heads",
            value=model.num_kv_heads,
            axis="tp",
            fits=lambda heads: model.num_heads % heads == 0,
        ),
        # Never fewer tokens than there are: the tokenizer has them.
        _Length(
            key="model.vocab_size",
            value=model.vocab_size,
            axis="tp",
            fits=lambda tokens: tokens > model.vocab_size,
        ),
        *(
            _Length(
                key=key,
                value=value,
                axis="ep",
                unit=len(moe.widths),
                unit_words=f"{len(moe.widths)} * " if len(moe.widths) > 1 else "",
                why="each rank has as many of each of model.moe.expert_widths"
                if len(moe.widths) > 1
                else "",
                fits=lambda experts: experts >= moe.top_k,
            )
            for key, value in (_numbers_of_experts(moe) if model.moe_layers else ())
        ),
        *(_expert_widths(config) if model.moe_layers else ()),
    ]
    if model.num_dense_layers or model.memory_layers.layers:
        found.append(_Length(key="model.d_ffn", value=model.d_ffn, axis="tp"))
    if model.memory_layers.layers:
        found += _memory_columns(model.memory_layers)
    if cp > 1:
        found.append(
            _Length(
                key="data.seq_len",
                value=config.data.seq_len,
                axis="cp",
                unit=2,
                unit_words="2 * ",
                why="a rank has an early and a late part of each sequence",
            )
        )
    if cp > 1 and config.parallel.cp_attention == "ulysses":
        has_experts = model.attention_experts > 1
        found.append(
            _Length(
                key="model.num_heads" + (" * model.attention_experts" if has_experts else ""),
                value=model.total_heads,
                axis="cp",
                unit=tp,
                unit_words=f"parallel.tp={tp} * " if tp > 1 else "",
                why="Ulysses attention shares out heads",
                fits=lambda _: False,  # a number of heads is chosen with many others
                or_else="parallel.cp_attention=ring",
            )
        )
    if (
        not config.batch.is_planned
        and config.data.seq_len >= 1
        and train.micro_batch_tokens % config.data.seq_len == 0
    ):
        found.append(
            _Length(
                key="train.micro_batch_tokens",
                value=train.micro_batch_tokens,
                axis="tp",
                unit=cp,
                unit_words=f"parallel.cp={cp} * " if cp > 1 else "",
                why="the ranks share out its tokens",
                fits=lambda tokens: tokens % config.data.seq_len == 0,
            )
        )
    return found


def _memory_tables(config: RunConfig) -> Iterator[Problem]:
    layers = list(config.model.memory_layers.layers)
    if layers and config.parallel.etp > 1:
        yield Problem(
            key="parallel.etp",
            given=config.parallel.etp,
            rule=f"must be 1 with model.memory_layers.layers={layers}: ranks of ep share out a memory's columns",
            fix="use parallel.etp=1 and a larger parallel.ep",
        )


def _memory_columns(memory: MemoryLayersConfig) -> list[_Length]:
    """Of what a token reads in a memory."""
    path, several = "model.memory_layers", memory.heads > 1
    of_value = _Length(
        key=f"{path}.d_value",
        value=memory.d_value,
        axis="ep",
        unit=max(1, memory.heads),
        unit_words=f"{path}.heads={memory.heads} * " if several else "",
        why="ranks share out each head's slice" if several else "",
    )
    return [of_value, _Length(key=f"{path}.d_pre", value=memory.d_pre, axis="ep")]


def _numbers_of_experts(moe: MoEConfig) -> list[tuple[str, int]]:
    """(key, number), once where layers have the same."""
    if moe.experts_by_layer is None:
        return [("model.moe.num_experts", moe.num_experts)]
    return [
        ("model.moe.experts_by_layer", number) for number in dict.fromkeys(moe.experts_by_layer)
    ]


def _expert_widths(config: RunConfig) -> Iterator[_Length]:
    moe = config.model.moe
    key = "model.moe.d_expert" if moe.expert_widths is None else "model.moe.expert_widths"
    for width in dict.fromkeys(moe.widths):
        length = _Length(key=key, value=width, axis="etp")
        if moe.expert_backend == "grouped_mm":
            per_row = values_per_row(config)
            length = replace(
                length,
                unit=per_row,
                unit_words=f"{per_row} * ",
                why=f"rows of 16 bytes in train.dtype={config.train.dtype}",
                or_else="model.moe.expert_backend=loop",
            )
        yield length


def values_per_row(config: RunConfig) -> int:
    """grouped_mm takes rows that are a multiple of 16 bytes."""
    return 16 // config.train.compute_bytes


def _shared_lengths(config: RunConfig, world_size: int) -> Iterator[Problem]:
    given = degrees(config.parallel)
    for length in _lengths(config):
        degree = given[length.axis]
        step = length.unit * degree
        if length.value < 1 or length.value % step == 0:
            continue
        rule = f"must be a multiple of {length.unit_words}parallel.{length.axis}={degree}"
        if degree == 1:
            rule = f"must be a multiple of {step}"
        elif length.unit > 1:
            rule += f" = {step}"
        if length.why:
            rule += f" ({length.why})"
        degrees_near = ""
        if degree > 1:
            allowed = allowed_degrees(config, world_size, length.axis)
            degrees_near = nearest(allowed, degree) or ("" if length.value % length.unit else "1")
        fixes = [
            multiples_near(step, length.value, length.fits),
            degrees_near and f"parallel.{length.axis}={degrees_near}",
            length.or_else,
        ]
        yield Problem(
            key=length.key,
            given=length.value,
            rule=rule,
            fix="use " + ", or ".join(filter(None, fixes)),
        )


def _ulysses(config: RunConfig) -> Iterator[Problem]:
    parallel, model = config.parallel, config.model
    num_kv_heads = model.total_kv_heads
    if parallel.cp_attention == "ring" or num_kv_heads < 1 or num_kv_heads % parallel.tp:
        return
    of_all = " of all attention experts" if num_kv_heads > model.num_kv_heads else ""
    heads = num_kv_heads // parallel.tp
    if heads % parallel.cp and parallel.cp % heads:
        yield Problem(
            key="parallel.cp",
            given=parallel.cp,
            rule=f"must divide model.num_kv_heads={num_kv_heads}{of_all} / parallel.tp={parallel.tp} = {heads}, "
            "or be a multiple of it, for Ulysses attention",
            fix="use parallel.cp_attention=ring",
        )


# --- Batches


def _batches(config: RunConfig, dims: ParallelDims | None) -> Iterator[Problem]:
    train, seq_len = config.train, config.data.seq_len
    for key in ("steps", "global_batch_tokens", "micro_batch_tokens", "log_every_steps"):
        yield from in_range(f"train.{key}", getattr(train, key), 1)
    for key in ("eval_every_steps", "eval_tokens"):
        yield from in_range(f"train.{key}", getattr(train, key), 0)
    yield from in_range("train.start_timeout_s", train.start_timeout_s, above=0.0)
    if train.timeout_s is not None:
        yield from in_range("train.timeout_s", train.timeout_s, above=0.0)
    yield from in_range("train.grace_s", train.grace_s, above=0.0)
    yield from in_range("data.seq_len", seq_len, 1)
    if seq_len < 1 or train.micro_batch_tokens < 1 or config.batch.is_planned:
        return
    if train.micro_batch_tokens % seq_len:
        step = math.lcm(seq_len, dims.cp * dims.tp) if dims else seq_len
        yield Problem(
            key="train.micro_batch_tokens",
            given=train.micro_batch_tokens,
            rule=f"must be a multiple of data.seq_len={seq_len}",
            fix=f"use {multiples_near(step, train.micro_batch_tokens)}",
        )
        return
    if dims is None:
        return
    per_micro_step = train.micro_batch_tokens * dims.dp
    if train.global_batch_tokens >= 1 and train.global_batch_tokens % per_micro_step:
        yield Problem(
            key="train.global_batch_tokens",
            given=train.global_batch_tokens,
            rule=f"must be a multiple of train.micro_batch_tokens={train.micro_batch_tokens} "
            f"* dp={dims.dp} = {per_micro_step}",
            fix=f"use {multiples_near(per_micro_step, train.global_batch_tokens)}",
        )
