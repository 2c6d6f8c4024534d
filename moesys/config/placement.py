"""The rules of `placement`. Pure."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from moesys.config.bounds import in_range, multiples_near
from moesys.config.errors import Problem
from moesys.config.placement_schema import PlacementConfig
from moesys.config.schema import RunConfig
from moesys.parallel.dims import ParallelDims, nodes_and_rails, parallel_dims
from moesys.plan.pipeline import SPLITS_BACKWARD

COPYING = ("balanced", "hecate", "everywhere", "eplb")
READERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tolerance": ("balanced",),
        "spare": ("balanced",),
        "near": ("balanced",),
        "overlap_degree": ("hecate",),
        "reshard_every_steps": ("balanced", "hecate"),
        **dict.fromkeys(
            ("every_steps", "predictor", "window_steps", "calibrate"),
            ("balanced", "hecate", "eplb"),
        ),
    }
)
"""Policies that read a key, of keys which not all of `COPYING` read."""


def find_placement_problems(
    config: RunConfig, world_size: int, ranks_per_node: int | None
) -> Iterator[Problem]:
    """`ranks_per_node`: as launched, where that is known."""
    placement = config.placement
    for key in ("copies", "overlap_degree", "every_steps", "window_steps"):
        if (value := getattr(placement, key)) is not None:
            yield from in_range(f"placement.{key}", value, 1)
    yield from in_range("placement.tolerance", placement.tolerance, 0)
    yield from in_range("placement.spare", placement.spare, 0)
    if placement.copies is None and placement.makes_copies and config.train.device == "cpu":
        yield Problem(
            key="placement.copies",
            given=None,
            rule="is as many as the memory of a GPU allows, and train.device=cpu uses none",
            fix="use a number, e.g. 2",
        )
    if placement.copies is not None and placement.spare > placement.copies >= 1:
        yield Problem(
            key="placement.spare",
            given=placement.spare,
            rule=f"must be at most placement.copies={placement.copies}, of which it is a part",
            fix=f"use {placement.copies}, or placement.copies={placement.spare}",
        )
    yield from in_range("placement.reshard_every_steps", placement.reshard_every_steps, 0)
    if placement.every_steps >= 1 and placement.reshard_every_steps % placement.every_steps:
        yield Problem(
            key="placement.reshard_every_steps",
            given=placement.reshard_every_steps,
            rule=f"must be a multiple of placement.every_steps={placement.every_steps}: copies are planned for owners",
            fix=f"use {multiples_near(placement.every_steps, placement.reshard_every_steps)}",
        )
    if not placement.makes_copies:
        return
    try:
        dims = parallel_dims(config.parallel, world_size)
    except ValueError:
        dims = None  # the degrees' own problem is told
    yield from _what_it_does_not_go_with(config, dims)
    per_node = config.dispatch.ranks_per_node or ranks_per_node
    if dims is not None and per_node is not None and per_node >= 1:
        yield from _nodes(config, dims, per_node)


def _what_it_does_not_go_with(config: RunConfig, dims: ParallelDims | None) -> Iterator[Problem]:
    moe, parallel, given = config.model.moe, config.parallel, config.placement.policy
    pads = moe.capacity_factor is not None and moe.capacity_policy == "pad"
    refused = [
        (
            pads,
            "gives experts several holders, and model.moe.capacity_policy=pad sends a fixed number of rows to every expert",
            "use model.moe.capacity_policy=drop",
        ),
        (
            config.dispatch.exchange == "deduplicated",
            "shares an expert's rows out over its holders, and dispatch.exchange=deduplicated sends them to a node at once",
            "use dispatch.exchange=flat or hierarchical",
        ),
        (
            moe.expert_widths is not None,
            f"copies experts of one width, and model.moe.expert_widths={[*moe.widths]} has several",
            "use model.moe.expert_widths=null",
        ),
        (
            config.model.share_depth != "none",
            f"plans for each layer, and model.share_depth={config.model.share_depth} gives several layers the same experts",
            "use model.share_depth=none",
        ),
        (
            dims is not None and dims.edp_shard > 1,
            f"needs an expert whole on its owner, and parallel.zero={parallel.zero} shards it over the ranks that have the same",
            "use parallel.zero=0, or a parallel.ep that takes all of these ranks",
        ),
        (
            parallel.pp > 1 and parallel.pp_schedule in SPLITS_BACKWARD,
            f"sends gradients home after the last backward of a step, which parallel.pp_schedule={parallel.pp_schedule} splits in two",
            "use parallel.pp_schedule=1f1b or interleaved",
        ),
    ]
    for is_so, rule, fix in refused:
        if is_so:
            yield Problem(
                key="placement.policy",
                given=given,
                rule=rule,
                fix=f"{fix}, or placement=fixed",
            )


def _nodes(config: RunConfig, dims: ParallelDims, per_node: int) -> Iterator[Problem]:
    """Groups lie on nodes in equal numbers."""
    try:
        for ranks in dims.groups("ep"):
            nodes_and_rails(ranks, per_node)
    except ValueError as error:
        yield Problem(
            key="placement.policy",
            given=config.placement.policy,
            rule=f"plans for nodes with as many ranks of parallel.ep={config.parallel.ep} each, and {error}",
            fix="use another parallel.ep, or a dispatch.ranks_per_node that it shares a factor with",
        )


def placement_warnings(config: RunConfig) -> Iterator[str]:
    """Options that nothing will read. The layout is one without problems."""
    placement = config.placement
    why = ""
    if not config.model.moe_layers:
        why = "without MoE layers"
    elif config.parallel.ep == 1:
        why = "with parallel.ep=1"
    if placement.makes_copies and why:
        yield f"placement.policy={placement.policy} has no effect {why}: there is no other rank for an expert"
    for key, field in PlacementConfig.__dataclass_fields__.items():
        value = getattr(placement, key)
        if key == "policy" or value == field.default:
            continue
        value = "null" if value is None else value
        if placement.policy not in READERS.get(key, COPYING):
            yield f"placement.{key}={value} has no effect with placement.policy={placement.policy}"
    if placement.predictor in ("last", "exponential") and placement.plans_ahead:
        default = PlacementConfig.__dataclass_fields__["window_steps"].default
        if placement.window_steps != default:
            yield (
                f"placement.window_steps={placement.window_steps} has no effect with placement.predictor={placement.predictor}"
            )
