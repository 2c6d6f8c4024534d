"""Rules about parallel.pp: what its schedule needs of layers and micro-batches, and what a cut model cannot have."""

from collections.abc import Iterator

from moesys.config.bounds import in_range
from moesys.config.errors import Problem
from moesys.config.schema import ParallelConfig, RunConfig
from moesys.parallel.dims import parallel_dims
from moesys.plan.pipeline import (
    LOOPED,
    SPLITS_BACKWARD,
    V_SHAPED,
    ScheduleProblem,
    layers_of_stages,
    schedule_problems,
    stages_per_rank,
    with_empty_micro_batches,
)


def find_pipeline_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Every rule of this file that `config` breaks on `world_size` ranks; none where the layout itself does not fit."""
    parallel, train = config.parallel, config.train
    small = list(in_range("parallel.pp_virtual_stages", parallel.pp_virtual_stages, 1))
    yield from small
    if parallel.pp < 2 or small:
        return
    if parallel.zero and parallel.pp_schedule in V_SHAPED:
        for key, off in (("tie_embeddings", False), ("mtp_depth", 0)):
            if (given := getattr(config.model, key)) == off:
                continue
            yield Problem(
                key=f"model.{key}",
                given=given,
                rule=f"makes one matrix of two stages that parallel.pp_schedule={parallel.pp_schedule} puts on one rank, "
                f"which parallel.zero={parallel.zero} cannot share out",
                fix=f"use model.{key}={str(off).lower()}, or parallel.zero=0, or parallel.pp_schedule=1f1b",
            )
    if (
        config.model.tie_embeddings
        and config.model.mtp_depth
        and parallel.pp_schedule in SPLITS_BACKWARD
    ):
        yield Problem(
            key="model.mtp_depth",
            given=config.model.mtp_depth,
            rule="reads a table before and after its layers with model.tie_embeddings=true, which "
            f"parallel.pp_schedule={parallel.pp_schedule} cannot split a backward of",
            fix="use model.tie_embeddings=false, or parallel.pp_schedule=1f1b or interleaved",
        )
    if (shared := config.model.share_depth) != "none":
        off = "model.share_depth=none"
        yield from find_sharing_problems(config, "model.share_depth", shared, off)
    try:
        dims = parallel_dims(parallel, world_size)
    except ValueError:
        return
    per_micro_step = train.micro_batch_tokens * dims.dp
    if config.batch.is_planned:  # filled up with empty ones
        virtual_stages = parallel.pp_virtual_stages
        number = with_empty_micro_batches(parallel.pp_schedule, parallel.pp, virtual_stages, 1)
    elif per_micro_step < 1 or train.global_batch_tokens % per_micro_step:
        return
    else:
        number = train.micro_steps(dims.dp)
    found = schedule_problems(
        parallel.pp_schedule,
        parallel.pp,
        parallel.pp_virtual_stages,
        number,
        config.model.num_layers,
    )
    yield from (_problem(problem, config, per_micro_step) for problem in found)


def find_sharing_problems(config: RunConfig, key: str, given: str, off: str) -> Iterator[Problem]:
    """What a pipeline cannot do with parameters that all MoE layers share, as `key` has them do; `off` ends it."""
    parallel, model = config.parallel, config.model
    schedule = parallel.pp_schedule
    per_rank = stages_per_rank(schedule, parallel.pp_virtual_stages)
    if parallel.pp < 2 or parallel.pp * per_rank > model.num_layers:
        return
    if parallel.zero and per_rank > 1:
        yield Problem(
            key=key,
            given=given,
            rule=f"makes one set of parameters of several stages that parallel.pp_schedule={schedule} puts on "
            f"one rank, which parallel.zero={parallel.zero} cannot share out",
            fix=f"use parallel.zero=0, or parallel.pp_schedule=1f1b, or {off}",
        )
    stages = layers_of_stages(model, parallel, config.data.seq_len)
    most = max(len(set(stage) & set(model.moe_layers)) for stage in stages)
    if schedule in SPLITS_BACKWARD and most > 1:
        yield Problem(
            key=key,
            given=given,
            rule=f"gives {most} layers of a stage one set of parameters, whose backward parallel.pp_schedule={schedule} "
            "cannot split: torch computes a parameter's part from one place of a stage",
            fix=f"use parallel.pp_schedule=1f1b or interleaved, or more stages, or {off}",
        )


def pipeline_warnings(parallel: ParallelConfig) -> Iterator[str]:
    """Options that nothing will read."""
    default = ParallelConfig()
    if parallel.pp == 1 and parallel.pp_schedule != default.pp_schedule:
        yield f"parallel.pp_schedule={parallel.pp_schedule} has no effect with parallel.pp=1"
    virtual_stages = parallel.pp_virtual_stages
    if parallel.pp_schedule not in LOOPED and virtual_stages != default.pp_virtual_stages:
        yield (
            f"parallel.pp_virtual_stages={virtual_stages} has no effect with "
            f"parallel.pp_schedule={parallel.pp_schedule}, only with {' and '.join(sorted(LOOPED))}"
        )


def _problem(found: ScheduleProblem, config: RunConfig, per_micro_step: int) -> Problem:
    """In the keys of a configuration: micro-batches are a matter of the global batch."""
    if found.key != "num_micro_batches":
        return Problem(key=found.key, given=found.given, rule=found.rule, fix=found.fix)
    tokens = [str(n * per_micro_step) for n in found.works]
    other = [f"parallel.pp_schedule={found.schedule}"] if found.schedule else []
    return Problem(
        key="train.global_batch_tokens",
        given=config.train.global_batch_tokens,
        rule=f"makes {found.given} micro-batches of a data rank, whose number {found.rule}",
        fix="use " + ", or ".join([" or ".join(tokens), *other]),
    )
