"""The rules of `dispatch`. Pure."""

from collections.abc import Iterator

from moesys.config.bounds import in_range
from moesys.config.dispatch_schema import WireConfig
from moesys.config.errors import Problem
from moesys.config.schema import RunConfig


def find_dispatch_problems(config: RunConfig) -> Iterator[Problem]:
    dispatch, moe = config.dispatch, config.model.moe
    yield from in_range("dispatch.wire.block", dispatch.wire.block, 0)
    yield from in_range("dispatch.warmup_steps", dispatch.warmup_steps, 0)
    if dispatch.codec and moe.capacity_factor is not None and moe.capacity_policy == "pad":
        yield Problem(
            key="model.moe.capacity_policy",
            given=moe.capacity_policy,
            rule=f"sends a fixed number of rows, of which dispatch.codec={dispatch.codec.target} could save none",
            fix="use model.moe.capacity_policy=drop, or codec=none",
        )


def dispatch_warnings(config: RunConfig) -> Iterator[str]:
    """Options that nothing will read."""
    dispatch, wire = config.dispatch, config.dispatch.wire
    why = "" if config.model.moe_layers else "without MoE layers"
    if config.parallel.ep == 1:
        why = "with parallel.ep=1"
    for key, is_used in (("codec", dispatch.codec is not None), ("wire", wire.is_used)):
        if is_used and why:
            yield f"dispatch.{key} has no effect {why}: no row travels"
    if dispatch.warmup_steps and not (dispatch.codec or wire.is_used):
        yield f"dispatch.warmup_steps={dispatch.warmup_steps} has no effect without codec and wire"
    unread = [
        ("block", wire.is_used),
        ("error_feedback", wire.is_used),
        ("stochastic_backward", {wire.dispatch_backward, wire.combine_backward} != {"none"}),
    ]
    for key, is_read in unread:
        value = getattr(wire, key)
        if not is_read and value != WireConfig.__dataclass_fields__[key].default:
            yield f"dispatch.wire.{key}={value} has no effect where nothing is written in eight bits"
