"""The rules of schema.py, all checked at once, before any process group exists.

`validate` is arithmetic on the configuration alone. `check_components` imports the classes that it
names, `check_files` looks at the disk. `check` reports what all three find as one error.
"""

import dataclasses
from collections.abc import Iterator

from moesys.config.components import find_component_problems
from moesys.config.errors import ConfigError, Problem
from moesys.config.files import find_file_problems
from moesys.config.schema import (
    BalanceConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    ScheduleConfig,
)

# Keys of `schedule` that only some kinds read.
_SCHEDULE_READERS = {
    "min_lr_ratio": ("cosine", "wsd", "power", "infinite"),
    "decay_steps": ("wsd", "power", "infinite"),
    "power_a": ("power",),
    "power_b": ("power",),
    "cooldown_steps": ("infinite",),
    "constant_lr_ratio": ("infinite",),
}


def check(config: RunConfig, world_size: int) -> list[str]:
    """Everything that can be known before start-up. Returns warnings: options without effect.

    Raises:
        ConfigError: every violated rule, component and file problem.
    """
    problems = [
        *_find_problems(config, world_size),
        *find_component_problems(config),
        *find_file_problems(config),
    ]
    if problems:
        raise ConfigError(problems)
    return warnings(config)


def validate(config: RunConfig, *, world_size: int) -> list[str]:
    """Check every rule that is arithmetic on `config`. Returns the warnings.

    Raises:
        ConfigError: every violated rule.
    """
    problems = list(_find_problems(config, world_size))
    if problems:
        raise ConfigError(problems)
    return warnings(config)


def check_components(config: RunConfig) -> None:
    """Import each `_target_` and compare its constructor to the options given. Raises ConfigError."""
    if problems := list(find_component_problems(config)):
        raise ConfigError(problems)


def check_files(config: RunConfig) -> None:
    """Look for the data folder and a place for the run folder. Raises ConfigError."""
    if problems := list(find_file_problems(config)):
        raise ConfigError(problems)


def warnings(config: RunConfig) -> list[str]:
    """Options that were set and that nothing will read, one sentence each."""
    found: list[str] = []
    moe, schedule = config.model.moe, config.schedule
    if config.model.num_dense_layers == config.model.num_layers:
        found.append(
            f"model.num_dense_layers={config.model.num_dense_layers} leaves no MoE layer: "
            "model.moe and parallel.ep have no effect"
        )
    if moe.capacity_factor is None and moe.capacity_policy != _default(
        MoEConfig, "capacity_policy"
    ):
        found.append(
            f"model.moe.capacity_policy={moe.capacity_policy} has no effect without "
            "model.moe.capacity_factor"
        )
    level = moe.balance.aux_loss_level
    if moe.balance.aux_loss_coef == 0 and level != _default(BalanceConfig, "aux_loss_level"):
        found.append(
            f"model.moe.balance.aux_loss_level={level} has no effect with "
            "model.moe.balance.aux_loss_coef=0"
        )
    for key, kinds in _SCHEDULE_READERS.items():
        value = getattr(schedule, key)
        if schedule.kind not in kinds and value != _default(ScheduleConfig, key):
            found.append(
                f"schedule.{key}={value} has no effect with schedule.kind={schedule.kind}, "
                f"only with {', '.join(kinds)}"
            )
    project = config.metrics.wandb_project
    if config.metrics.wandb == "off" and project != _default(MetricsConfig, "wandb_project"):
        found.append(f"metrics.wandb_project={project} has no effect with metrics.wandb=off")
    if config.train.eval_every_steps > config.train.steps:
        found.append(
            f"train.eval_every_steps={config.train.eval_every_steps} is beyond "
            f"train.steps={config.train.steps}: the only evaluation is after the last step"
        )
    if config.checkpoint.every_steps > config.train.steps:
        found.append(
            f"checkpoint.every_steps={config.checkpoint.every_steps} is beyond "
            f"train.steps={config.train.steps}: the only checkpoint is at the end"
        )
    return found


def _default(section: type, key: str) -> object:
    return section.__dataclass_fields__[key].default


def _find_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    assert world_size >= 1
    yield from _run(config)
    yield from _model(config.model)
    yield from _moe(config)
    yield from _optim(config)
    yield from _schedule(config)
    yield from _parallel(config, world_size)
    yield from _batches(config, world_size)


def _run(config: RunConfig) -> Iterator[Problem]:
    if not config.run.name or "/" in config.run.name or config.run.name in (".", ".."):
        yield Problem(
            key="run.name",
            given=config.run.name,
            rule="must be a word that can name a folder",
            fix="use letters, digits, - and _; the place of the folder is run.dir",
        )
    if not config.run.dir:
        yield Problem(key="run.dir", given="", rule="must not be empty", fix="use runs/${run.name}")
    if not config.data.path:
        yield Problem(
            key="data.path", given="", rule="must not be empty", fix="name a folder of moesys prep"
        )
    yield from _in_range("run.seed", config.run.seed, 0, below=2**63)
    yield from _in_range("checkpoint.every_steps", config.checkpoint.every_steps, 0)
    yield from _in_range("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    if config.metrics.peak_tflops is not None:
        yield from _in_range("metrics.peak_tflops", config.metrics.peak_tflops, above=0.0)


def _model(model: ModelConfig) -> Iterator[Problem]:
    for key in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ffn"):
        yield from _in_range(f"model.{key}", getattr(model, key), 1)
    for key in ("rope_theta", "norm_eps", "init_std"):
        yield from _in_range(f"model.{key}", getattr(model, key), above=0.0)
    yield from _in_range("model.num_dense_layers", model.num_dense_layers, 0)
    if model.num_dense_layers > model.num_layers >= 1:
        yield Problem(
            key="model.num_dense_layers",
            given=model.num_dense_layers,
            rule=f"must be at most model.num_layers={model.num_layers}",
            fix=f"use 0 to {model.num_layers}",
        )
    if model.num_heads >= 1 and model.num_kv_heads >= 1 and model.num_heads % model.num_kv_heads:
        yield Problem(
            key="model.num_kv_heads",
            given=model.num_kv_heads,
            rule=f"must divide model.num_heads={model.num_heads}",
            fix=f"use {_divisors_near(model.num_heads, model.num_kv_heads)}",
        )
    if model.head_dim is not None:
        if model.head_dim < 2 or model.head_dim % 2:
            yield Problem(
                key="model.head_dim",
                given=model.head_dim,
                rule="must be even and at least 2 (rotary embedding turns pairs)",
                fix=f"use {_multiples_near(2, model.head_dim)}",
            )
    elif model.num_heads >= 1 and model.d_model >= 1 and model.d_model % (2 * model.num_heads):
        yield Problem(
            key="model.d_model",
            given=model.d_model,
            rule=f"must be an even multiple of model.num_heads={model.num_heads}",
            fix=f"use {_multiples_near(2 * model.num_heads, model.d_model)}, or set model.head_dim",
        )


def _moe(config: RunConfig) -> Iterator[Problem]:
    moe, path = config.model.moe, "model.moe"
    for key in ("num_experts", "top_k", "d_expert"):
        yield from _in_range(f"{path}.{key}", getattr(moe, key), 1)
    yield from _in_range(f"{path}.num_shared_experts", moe.num_shared_experts, 0)
    if moe.top_k > moe.num_experts >= 1:
        yield Problem(
            key=f"{path}.top_k",
            given=moe.top_k,
            rule=f"must be at most {path}.num_experts={moe.num_experts}",
            fix=f"use 1 to {moe.num_experts}",
        )
    if moe.capacity_factor is not None:
        yield from _in_range(f"{path}.capacity_factor", moe.capacity_factor, above=0.0)
    for field in dataclasses.fields(moe.balance):
        if field.name != "aux_loss_level":
            value = getattr(moe.balance, field.name)
            yield from _in_range(f"{path}.balance.{field.name}", value, 0.0)
    if moe.expert_backend == "grouped_mm":
        per_row = 16 // (2 if config.train.dtype == "bf16" else 4)
        for key, width in (
            ("model.d_model", config.model.d_model),
            (f"{path}.d_expert", moe.d_expert),
        ):
            if width % per_row:
                yield Problem(
                    key=key,
                    given=width,
                    rule=f"must be a multiple of {per_row} (rows of 16 bytes in "
                    f"train.dtype={config.train.dtype}) for {path}.expert_backend=grouped_mm",
                    fix=f"use {_multiples_near(per_row, width)}, or {path}.expert_backend=loop",
                )


def _optim(config: RunConfig) -> Iterator[Problem]:
    optim = config.optim
    yield from _in_range("optim.lr", optim.lr, above=0.0)
    yield from _in_range("optim.eps", optim.eps, above=0.0)
    yield from _in_range("optim.beta1", optim.beta1, 0.0, below=1.0)
    yield from _in_range("optim.beta2", optim.beta2, 0.0, below=1.0)
    yield from _in_range("optim.weight_decay", optim.weight_decay, 0.0)
    yield from _in_range("optim.clip_grad_norm", optim.clip_grad_norm, 0.0)


def _schedule(config: RunConfig) -> Iterator[Problem]:
    schedule, steps = config.schedule, config.train.steps
    for key in ("warmup_steps", "decay_steps", "cooldown_steps"):
        yield from _in_range(f"schedule.{key}", getattr(schedule, key), 0)
    for key in ("min_lr_ratio", "constant_lr_ratio"):
        yield from _in_range(f"schedule.{key}", getattr(schedule, key), 0.0, at_most=1.0)
    phases = ["warmup_steps"]
    phases += [
        key for key in ("cooldown_steps", "decay_steps") if schedule.kind in _SCHEDULE_READERS[key]
    ]
    total = sum(getattr(schedule, key) for key in phases)
    if total > steps >= 1:
        parts = " + ".join(f"{key}={getattr(schedule, key)}" for key in phases)
        yield Problem(
            key="schedule",
            rule=f"phases {parts} make {total} steps, which must fit in train.steps={steps}",
            fix=f"use at least train.steps={total}, or shorten the phases",
        )
    if schedule.kind in ("wsd", "infinite") and schedule.decay_steps == 0:
        yield Problem(
            key="schedule.decay_steps",
            given=0,
            rule=f"must be at least 1 with schedule.kind={schedule.kind}",
            fix=f"use a tenth of train.steps, {max(1, steps // 10)}, or schedule.kind=constant",
        )
    if schedule.kind == "power":
        yield from _in_range("schedule.power_a", schedule.power_a, above=0.0)
        if schedule.power_b > 0:
            yield Problem(
                key="schedule.power_b",
                given=schedule.power_b,
                rule="must be at most 0, or the learning rate grows with the tokens seen",
                fix="use -0.51",
            )
    if schedule.kind == "infinite":
        # The anneal is exponential between the two ratios, so neither can be 0.
        yield from _in_range("schedule.min_lr_ratio", schedule.min_lr_ratio, above=0.0)
        if 0 <= schedule.constant_lr_ratio < schedule.min_lr_ratio <= 1:
            yield Problem(
                key="schedule.constant_lr_ratio",
                given=schedule.constant_lr_ratio,
                rule=f"must be at least schedule.min_lr_ratio={schedule.min_lr_ratio}",
                fix=f"use {schedule.min_lr_ratio} to 1.0",
            )


def _parallel(config: RunConfig, world_size: int) -> Iterator[Problem]:
    ep, num_experts = config.parallel.ep, config.model.moe.num_experts
    if ep < 1:
        yield from _in_range("parallel.ep", ep, 1)
        return
    if world_size % ep:
        yield Problem(
            key="parallel.ep",
            given=ep,
            rule=f"must divide the world size {world_size}",
            fix=f"use parallel.ep={_divisors_near(world_size, ep)}, "
            f"or start {_multiples_near(ep, world_size)} ranks (--nproc)",
        )
    if num_experts >= 1 and num_experts % ep:
        yield Problem(
            key="model.moe.num_experts",
            given=num_experts,
            rule=f"must be a multiple of parallel.ep={ep}",
            fix=f"use {_multiples_near(ep, num_experts)}",
        )


def _batches(config: RunConfig, world_size: int) -> Iterator[Problem]:
    train, seq_len = config.train, config.data.seq_len
    for key in ("steps", "global_batch_tokens", "micro_batch_tokens", "log_every_steps"):
        yield from _in_range(f"train.{key}", getattr(train, key), 1)
    for key in ("eval_every_steps", "eval_tokens"):
        yield from _in_range(f"train.{key}", getattr(train, key), 0)
    yield from _in_range("train.timeout_s", train.timeout_s, above=0.0)
    yield from _in_range("data.seq_len", seq_len, 1)
    if seq_len < 1 or train.micro_batch_tokens < 1:
        return
    if train.micro_batch_tokens % seq_len:
        yield Problem(
            key="train.micro_batch_tokens",
            given=train.micro_batch_tokens,
            rule=f"must be a multiple of data.seq_len={seq_len}",
            fix=f"use {_multiples_near(seq_len, train.micro_batch_tokens)}",
        )
        return
    per_micro_step = train.micro_batch_tokens * world_size
    if train.global_batch_tokens >= 1 and train.global_batch_tokens % per_micro_step:
        yield Problem(
            key="train.global_batch_tokens",
            given=train.global_batch_tokens,
            rule=f"must be a multiple of train.micro_batch_tokens={train.micro_batch_tokens} "
            f"* world size {world_size} = {per_micro_step}",
            fix=f"use {_multiples_near(per_micro_step, train.global_batch_tokens)}",
        )


def _in_range(
    key: str,
    value: float,
    at_least: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Iterator[Problem]:
    bounds = [
        (at_least, "at least", lambda bound: value >= bound),
        (above, "above", lambda bound: value > bound),
        (below, "below", lambda bound: value < bound),
        (at_most, "at most", lambda bound: value <= bound),
    ]
    given = [bound for bound in bounds if bound[0] is not None]
    if not all(holds(bound) for bound, _, holds in given):
        rule = " and ".join(f"{words} {bound}" for bound, words, _ in given)
        yield Problem(key=key, given=value, rule=f"must be {rule}", fix=f"use a value {rule}")


def _multiples_near(step: int, value: int) -> str:
    """The multiples of `step` on both sides of `value`, without 0: "4 or 8"."""
    lower = value // step * step
    return " or ".join(str(multiple) for multiple in (lower, lower + step) if multiple > 0)


def _divisors_near(number: int, value: int) -> str:
    """The divisors of `number` on both sides of `value`: "2 or 4"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    lower = [d for d in divisors if d < value][-1:]
    upper = [d for d in divisors if d > value][:1]
    return " or ".join(map(str, lower + upper))
