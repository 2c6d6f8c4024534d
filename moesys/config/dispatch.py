"""The rules of `dispatch`. Pure."""

from collections.abc import Iterator

from moesys.config.bounds import in_range
from moesys.config.dispatch_schema import DispatchConfig, WireConfig
from moesys.config.errors import Problem
from moesys.config.schema import RunConfig
from moesys.parallel.dims import nodes_and_rails, parallel_dims

MOST_EXPERTS_OF_NODE = 2**15
"""Whose numbers travel with a deduplicated row, -1 being none."""


def find_dispatch_problems(
    config: RunConfig, world_size: int, ranks_per_node: int | None
) -> Iterator[Problem]:
    """`ranks_per_node`: as launched, where that is known."""
    dispatch, moe = config.dispatch, config.model.moe
    pads = moe.capacity_factor is not None and moe.capacity_policy == "pad"
    yield from _block("dispatch.wire.block", dispatch.wire)
    yield from in_range("dispatch.warmup_steps", dispatch.warmup_steps, 0)
    yield from _candidates(dispatch)
    yield from _exchange(config, world_size, dispatch.ranks_per_node or ranks_per_node)
    if dispatch.exchange == "deduplicated" and pads:
        yield Problem(
            key="model.moe.capacity_policy",
            given=moe.capacity_policy,
            rule="sends a fixed number of rows to every expert, and dispatch.exchange=deduplicated one to every node",
            fix="use model.moe.capacity_policy=drop, or dispatch.exchange=hierarchical",
        )
    if dispatch.codecs and pads:
        key, codec = next(iter(dispatch.codecs.items()))
        yield Problem(
            key="model.moe.capacity_policy",
            given=moe.capacity_policy,
            rule=f"sends a fixed number of rows, of which {key}={codec.target} could save none",
            fix="use model.moe.capacity_policy=drop, or codec=none",
        )


def _block(key: str, wire: WireConfig) -> Iterator[Problem]:
    yield from in_range(key, wire.block, 0)
    if wire.block > 0 and wire.block % 2 and "int4" in wire.kinds:
        rule = "must be even with int4, which has two numbers in a byte"
        yield Problem(key=key, given=wire.block, rule=rule, fix=f"use {wire.block + 1}")


def _candidates(dispatch: DispatchConfig) -> Iterator[Problem]:
    """What MoE layers choose from, and by what."""
    if not dispatch.candidates:
        return
    for name, candidate in dispatch.candidates.items():
        key = f"dispatch.candidates.{name}"
        yield from _block(f"{key}.wire.block", candidate.wire)
        if name == "none":
            rule = "is the name of leaving rows as they are, which every layer may"
            yield Problem(key=key, rule=rule, fix="give it another name")
        elif candidate.codec is None and not candidate.wire.is_used:
            rule = "has neither codec nor wire, and every layer may leave rows as they are"
            yield Problem(key=key, rule=rule, fix="give it one, or remove it")
    if dispatch.codec is not None or dispatch.wire.is_used:
        key = "dispatch.wire" if dispatch.codec is None else "dispatch.codec"
        rule = "must not be set beside dispatch.candidates, from which layers choose"
        yield Problem(key=key, rule=rule, fix="make it one of them, or use dispatch.candidates={}")
    budgets = {
        "dispatch.error_budget": (dispatch.error_budget, None),
        "dispatch.byte_budget": (dispatch.byte_budget, 1),
    }
    given = {key: budget for key, budget in budgets.items() if budget[0] is not None}
    if not given:
        rule = "or dispatch.byte_budget must be given with dispatch.candidates, which layers choose from by it"
        yield Problem(key="dispatch.error_budget", rule=rule, fix="use e.g. 0.2")
    if len(given) > 1:
        yield Problem(
            key="dispatch.byte_budget",
            given=dispatch.byte_budget,
            rule=f"and dispatch.error_budget={dispatch.error_budget}: layers choose by one of them",
            fix="add dispatch.error_budget=null, or dispatch.byte_budget=null",
        )
    for key, (value, most) in given.items():
        assert value is not None
        yield from in_range(key, value, above=0, at_most=most)
    if dispatch.warmup_steps < 1:
        yield Problem(
            key="dispatch.warmup_steps",
            given=dispatch.warmup_steps,
            rule="must be at least 1 with dispatch.candidates: a model that has learnt nothing says nothing of them",
            fix="use e.g. 20",
        )


def _exchange(config: RunConfig, world_size: int, per_node: int | None) -> Iterator[Problem]:
    """Groups that are to be cut by nodes lie on these in equal numbers."""
    dispatch, parallel = config.dispatch, config.parallel
    if dispatch.ranks_per_node is not None:
        yield from in_range("dispatch.ranks_per_node", dispatch.ranks_per_node, 1)
    if dispatch.exchange == "flat" or per_node is None or per_node < 1:
        return
    try:
        groups = parallel_dims(parallel, world_size).groups("ep")
    except ValueError:
        return  # the degrees' own problem is told
    num_nodes = 1
    try:
        for ranks in groups:
            num_nodes = len(nodes_and_rails(ranks, per_node)[0])
    except ValueError as error:
        yield Problem(
            key="dispatch.exchange",
            given=dispatch.exchange,
            rule=f"cuts the groups of parallel.ep={parallel.ep} by nodes, and {error}",
            fix="use dispatch.exchange=flat, another parallel.ep, or a dispatch.ranks_per_node that it shares a factor with",
        )
        return
    on_node = config.model.moe.num_experts // num_nodes
    if dispatch.exchange == "deduplicated" and on_node > MOST_EXPERTS_OF_NODE:
        yield Problem(
            key="dispatch.exchange",
            given=dispatch.exchange,
            rule=f"tells a node's experts in 16 bits, at most {MOST_EXPERTS_OF_NODE}, and a node has {on_node}",
            fix="use dispatch.exchange=hierarchical, or more nodes",
        )


def dispatch_warnings(
    config: RunConfig, world_size: int, ranks_per_node: int | None
) -> Iterator[str]:
    """Options that nothing will read. The layout is one without problems."""
    dispatch, wire = config.dispatch, config.dispatch.wire
    why = "" if config.model.moe_layers else "without MoE layers"
    if config.parallel.ep == 1:
        why = "with parallel.ep=1"
    is_cut = dispatch.exchange != "flat"
    for key, is_used in (
        ("codec", dispatch.codec is not None),
        ("wire", wire.is_used),
        ("candidates", bool(dispatch.candidates)),
        ("exchange", is_cut),
    ):
        if is_used and why:
            yield f"dispatch.{key} has no effect {why}: no row travels"
    per_node = dispatch.ranks_per_node or ranks_per_node
    if is_cut and not why and per_node is not None:
        groups = parallel_dims(config.parallel, world_size).groups("ep")
        if all(ranks[0] // per_node == ranks[-1] // per_node for ranks in groups):
            yield f"dispatch.exchange={dispatch.exchange} has no effect: every group of parallel.ep lies on one node"
    if dispatch.exchange == "deduplicated" and dispatch.codecs:
        yield (
            f"dispatch.exchange=deduplicated finds nothing to merge: a row of {next(iter(dispatch.codecs))} is for one "
            "expert; hierarchical sends less beside it"
        )
    for key in ("error_budget", "byte_budget"):
        if getattr(dispatch, key) is not None and not dispatch.candidates:
            yield f"dispatch.{key}={getattr(dispatch, key)} has no effect without dispatch.candidates"
    if dispatch.warmup_steps and not dispatch.compresses:
        yield f"dispatch.warmup_steps={dispatch.warmup_steps} has no effect without codec and wire"
    if dispatch.compresses and not why and dispatch.warmup_steps >= config.train.steps:
        yield (
            f"dispatch.warmup_steps={dispatch.warmup_steps}: none of train.steps={config.train.steps} has codec or wire"
        )
    has_gradients = {wire.dispatch_backward, wire.combine_backward} != {"none"}
    readers = [
        ("block", wire.is_used, "nothing"),
        ("error_feedback", has_gradients, "no gradient"),
        ("stochastic_backward", has_gradients, "no gradient"),
    ]
    for key, is_read, what in readers:
        value = getattr(wire, key)
        if not is_read and value != WireConfig.__dataclass_fields__[key].default:
            yield f"dispatch.wire.{key}={value} has no effect where {what} is written in fewer bits"
