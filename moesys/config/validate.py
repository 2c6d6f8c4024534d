"""The rules of schema.py, all checked at once, before any process group exists.

`validate` is arithmetic on the configuration alone. `check_components` imports the classes that it
names, `check_files` looks at the disk. `check` reports what all three find as one error.
"""

from collections.abc import Iterator

from moesys.config.batch import batch_warnings, find_batch_problems
from moesys.config.bounds import divisors, in_range, multiples_near, nearest
from moesys.config.components import find_component_problems
from moesys.config.dispatch import dispatch_warnings, find_dispatch_problems
from moesys.config.errors import ConfigError, Problem
from moesys.config.experts import find_expert_problems
from moesys.config.files import find_file_problems
from moesys.config.layout import find_layout_problems, layout_warnings
from moesys.config.memory_layers import (
    find_memory_layer_problems,
    layers_without_moe,
    memory_layer_warnings,
)
from moesys.config.nodes import node_warnings
from moesys.config.offload import find_offload_problems, offload_warnings
from moesys.config.pipeline import find_pipeline_problems, pipeline_warnings
from moesys.config.placement import find_placement_problems, placement_warnings
from moesys.config.schema import (
    AnomalyConfig,
    BalanceConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from moesys.config.sources import find_source_problems, mixing_warnings

# Keys of `schedule` that only some kinds read.
_SCHEDULE_READERS = {
    "min_lr_ratio": ("cosine", "wsd", "power", "infinite"),
    "decay_steps": ("wsd", "power", "infinite"),
    "power_a": ("power",),
    "power_b": ("power",),
    "cooldown_steps": ("infinite",),
    "constant_lr_ratio": ("infinite",),
}


def check(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> list[str]:
    """Everything that can be known before start-up. Returns warnings: options without effect, and
    groups that talk much and lie on several nodes, where `ranks_per_node` says which ranks share one.

    Raises:
        ConfigError: every violated rule, component and file problem.
    """
    problems = [
        *_find_problems(config, world_size, ranks_per_node),
        *find_component_problems(config),
        *find_file_problems(config),
    ]
    if problems:
        raise ConfigError(problems)
    return warnings(config, world_size, ranks_per_node)


def validate(config: RunConfig, *, world_size: int, ranks_per_node: int | None = None) -> list[str]:
    """Check every rule that is arithmetic on `config`. Returns the warnings of `check`.

    Raises:
        ConfigError: every violated rule.
    """
    problems = list(_find_problems(config, world_size, ranks_per_node))
    if problems:
        raise ConfigError(problems)
    return warnings(config, world_size, ranks_per_node)


def check_components(config: RunConfig) -> None:
    """Import each `_target_` and compare its constructor to the options given. Raises ConfigError."""
    if problems := list(find_component_problems(config)):
        raise ConfigError(problems)


def check_files(config: RunConfig) -> None:
    """Look for the data folder and a place for the run folder. Raises ConfigError."""
    if problems := list(find_file_problems(config)):
        raise ConfigError(problems)


def warnings(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> list[str]:
    """One sentence for each option that was set and that nothing will read, and for slow groups."""
    found: list[str] = []
    moe, schedule = config.model.moe, config.schedule
    if not config.model.moe_layers:
        has_memory = bool(config.model.memory_layers.layers)
        unread = "model.moe has" if has_memory else "model.moe, parallel.ep and parallel.etp have"
        found.append(f"{layers_without_moe(config.model)} leaves no MoE layer: {unread} no effect")
        if recorded := config.metrics.record_choices_steps:
            found.append(
                f"metrics.record_choices_steps={recorded} has no effect without MoE layers"
            )
    found += memory_layer_warnings(config.model)
    if config.model.share_depth != "none" and len(config.model.moe_layers) < 2:
        found.append(
            f"model.share_depth={config.model.share_depth} has no effect with fewer than two MoE layers"
        )
    if config.model.attention_experts == 1 and config.model.attention_experts_kv != "own":
        found.append(
            f"model.attention_experts_kv={config.model.attention_experts_kv} has no effect with "
            "model.attention_experts=1"
        )
    for key in ("capacity_policy", "capacity_priority"):
        value = getattr(moe, key)
        if moe.capacity_factor is None and value != _default(MoEConfig, key):
            found.append(f"model.moe.{key}={value} has no effect without model.moe.capacity_factor")
    for key, reader in (
        ("device_groups", "device_loss_coef"),
        ("bias_end_step", "bias_update_rate"),
    ):
        value = getattr(moe.balance, key)
        if not getattr(moe.balance, reader) and value != _default(BalanceConfig, key):
            found.append(
                f"model.moe.balance.{key}={value} has no effect with model.moe.balance.{reader}=0"
            )
    for key, kinds in _SCHEDULE_READERS.items():
        value = getattr(schedule, key)
        if schedule.kind not in kinds and value != _default(ScheduleConfig, key):
            found.append(
                f"schedule.{key}={value} has no effect with schedule.kind={schedule.kind}, "
                f"only with {', '.join(kinds)}"
            )
    decay = config.optim.weight_decay
    if config.optim.frozen_experts is not None and decay != _default(OptimConfig, "weight_decay"):
        found.append(f"optim.weight_decay={decay} has no effect with optim.frozen_experts")
    project = config.metrics.wandb_project
    if config.metrics.wandb == "off" and project != _default(MetricsConfig, "wandb_project"):
        found.append(f"metrics.wandb_project={project} has no effect with metrics.wandb=off")
    for key, has_reader, reader in _anomaly_readers(config, world_size):
        if not has_reader and getattr(config.anomaly, key) != _default(AnomalyConfig, key):
            value = getattr(config.anomaly, key)
            found.append(f"anomaly.{key}={value} has no effect {reader}")
    ratio = config.metrics.straggler_ratio
    if not config.metrics.straggler_every_steps and ratio != _default(
        MetricsConfig, "straggler_ratio"
    ):
        found.append(
            f"metrics.straggler_ratio={ratio} has no effect with metrics.straggler_every_steps=0"
        )
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
    found += mixing_warnings(config)
    found += dispatch_warnings(config, world_size, ranks_per_node)
    found += placement_warnings(config)
    found += batch_warnings(config)
    found += offload_warnings(config)
    found += layout_warnings(config, world_size)
    found += pipeline_warnings(config.parallel)
    if ranks_per_node is not None:
        found += node_warnings(config, world_size, ranks_per_node)
    return found


def _default(section: type, key: str) -> object:
    return section.__dataclass_fields__[key].default


def _anomaly_readers(config: RunConfig, world_size: int) -> Iterator[tuple[str, bool, str]]:
    """Key, whether anything reads it, and what does if not."""
    anomaly = config.anomaly
    lowers = anomaly.policy in ("skip", "reinject", "lower_rate")
    for key in ("window_steps", "warmup_steps"):
        yield key, anomaly.sigma > 0, "with anomaly.sigma=0"
    for key in ("tries", "calm_steps"):
        yield key, anomaly.policy != "stop", "with anomaly.policy=stop"
    for key in ("rate_factor", "rate_steps"):
        yield key, lowers, f"with anomaly.policy={anomaly.policy}"
    reinjects = anomaly.policy == "reinject"
    yield "reinject_after_steps", reinjects, f"with anomaly.policy={anomaly.policy}"
    yield "replicas_every_steps", world_size > 1, "with one rank"


def _find_problems(
    config: RunConfig, world_size: int, ranks_per_node: int | None
) -> Iterator[Problem]:
    assert world_size >= 1
    yield from _run(config)
    yield from find_source_problems(config)
    yield from _model(config.model)
    yield from find_expert_problems(config)
    yield from find_memory_layer_problems(config)
    yield from find_dispatch_problems(config, world_size, ranks_per_node)
    yield from find_placement_problems(config, world_size, ranks_per_node)
    yield from find_batch_problems(config, world_size)
    yield from find_offload_problems(config)
    yield from _optim(config)
    yield from _schedule(config)
    yield from _anomaly(config)
    yield from find_layout_problems(config, world_size)
    yield from find_pipeline_problems(config, world_size)


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
    yield from in_range("run.seed", config.run.seed, 0, below=2**63)
    yield from in_range("checkpoint.every_steps", config.checkpoint.every_steps, 0)
    yield from in_range("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    yield from in_range("metrics.record_choices_steps", config.metrics.record_choices_steps, 0)
    yield from in_range("metrics.straggler_every_steps", config.metrics.straggler_every_steps, 0)
    yield from in_range("metrics.straggler_ratio", config.metrics.straggler_ratio, above=1.0)
    if config.metrics.peak_tflops is not None:
        yield from in_range("metrics.peak_tflops", config.metrics.peak_tflops, above=0.0)


def _model(model: ModelConfig) -> Iterator[Problem]:
    sizes = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ffn")
    for key in (*sizes, "attention_experts"):
        yield from in_range(f"model.{key}", getattr(model, key), 1)
    for key in ("rope_theta", "norm_eps", "init_std"):
        yield from in_range(f"model.{key}", getattr(model, key), above=0.0)
    for key in ("num_dense_layers", "mtp_depth", "mtp_loss_coef"):
        yield from in_range(f"model.{key}", getattr(model, key), 0)
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
            fix=f"use {nearest(divisors(model.num_heads), model.num_kv_heads)}",
        )
    if model.head_dim is not None:
        if model.head_dim < 2 or model.head_dim % 2:
            yield Problem(
                key="model.head_dim",
                given=model.head_dim,
                rule="must be even and at least 2 (rotary embedding turns pairs)",
                fix=f"use {multiples_near(2, model.head_dim)}",
            )
    elif model.num_heads >= 1 and model.d_model >= 1 and model.d_model % (2 * model.num_heads):
        yield Problem(
            key="model.d_model",
            given=model.d_model,
            rule=f"must be an even multiple of model.num_heads={model.num_heads}",
            fix=f"use {multiples_near(2 * model.num_heads, model.d_model)}, or set model.head_dim",
        )


def _optim(config: RunConfig) -> Iterator[Problem]:
    optim = config.optim
    yield from in_range("optim.lr", optim.lr, above=0.0)
    yield from in_range("optim.eps", optim.eps, above=0.0)
    yield from in_range("optim.beta1", optim.beta1, 0.0, below=1.0)
    yield from in_range("optim.beta2", optim.beta2, 0.0, below=1.0)
    yield from in_range("optim.weight_decay", optim.weight_decay, 0.0)
    yield from in_range("optim.clip_grad_norm", optim.clip_grad_norm, 0.0)


def _schedule(config: RunConfig) -> Iterator[Problem]:
    schedule, steps = config.schedule, config.train.steps
    for key in ("warmup_steps", "decay_steps", "cooldown_steps"):
        yield from in_range(f"schedule.{key}", getattr(schedule, key), 0)
    for key in ("min_lr_ratio", "constant_lr_ratio"):
        yield from in_range(f"schedule.{key}", getattr(schedule, key), 0.0, at_most=1.0)
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
        yield from in_range("schedule.power_a", schedule.power_a, above=0.0)
        if schedule.power_b > 0:
            yield Problem(
                key="schedule.power_b",
                given=schedule.power_b,
                rule="must be at most 0, or the learning rate grows with the tokens seen",
                fix="use -0.51",
            )
    if schedule.kind == "infinite":
        # The anneal is exponential between the two ratios, so neither can be 0.
        yield from in_range("schedule.min_lr_ratio", schedule.min_lr_ratio, above=0.0)
        if 0 <= schedule.constant_lr_ratio < schedule.min_lr_ratio <= 1:
            yield Problem(
                key="schedule.constant_lr_ratio",
                given=schedule.constant_lr_ratio,
                rule=f"must be at least schedule.min_lr_ratio={schedule.min_lr_ratio}",
                fix=f"use {schedule.min_lr_ratio} to 1.0",
            )


def _anomaly(config: RunConfig) -> Iterator[Problem]:
    anomaly = config.anomaly
    for key in ("tries", "calm_steps", "rate_steps", "reinject_after_steps"):
        yield from in_range(f"anomaly.{key}", getattr(anomaly, key), 1)
    if anomaly.sigma:
        yield from in_range("anomaly.sigma", anomaly.sigma, 3.0)
    yield from in_range("anomaly.window_steps", anomaly.window_steps, 16)
    if anomaly.window_steps >= 16:
        most = anomaly.window_steps
        yield from in_range("anomaly.warmup_steps", anomaly.warmup_steps, 16, at_most=most)
    yield from in_range("anomaly.rate_factor", anomaly.rate_factor, above=0.0, below=1.0)
    yield from in_range("anomaly.replicas_every_steps", anomaly.replicas_every_steps, 0)
    if anomaly.policy == "roll_back" and config.checkpoint.every_steps == 0:
        yield Problem(
            key="anomaly.policy",
            given=anomaly.policy,
            rule="must not be roll_back with checkpoint.every_steps=0, which saves nothing to go back to",
            fix="set checkpoint.every_steps, or use stop, skip, reinject or lower_rate",
        )
