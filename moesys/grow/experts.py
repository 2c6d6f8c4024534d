"""Which tensors have a row for each expert, and a model with other rows of them. Pure but for the shapes of a router.

Shapes: E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moesys.checkpoint.weights import WEIGHTS
from moesys.config.schema import ModelConfig
from moesys.grow.change import NewTensor, Shapes, mean_of, rows_of
from moesys.grow.part import Part, shapes_of
from moesys.grow.write import Growth


def experts_by_layer(model: ModelConfig) -> list[int]:
    """Routed experts of each MoE layer."""
    return [model.moe_of(layer).num_experts for layer in model.moe_layers]


def with_experts(model: ModelConfig, numbers: Sequence[int], top_k: int) -> ModelConfig:
    """The model with so many routed experts in each MoE layer."""
    by_layer = tuple(numbers) if len(set(numbers)) > 1 else None
    moe = replace(model.moe, num_experts=max(numbers), experts_by_layer=by_layer, top_k=top_k)
    return replace(model, moe=moe)


def layer_of(name: str) -> int:
    """The layer that a tensor of one is of."""
    return int(name.removeprefix(f"{WEIGHTS}layers.").partition(".")[0])


def rowed(model: ModelConfig, grown: ModelConfig, old: Shapes, new: Shapes) -> set[str]:
    """The tensors that have a row for each expert: the experts' own, and what of a router grows with their number.

    Raises:
        ValueError: a router with a tensor that depends on the number of experts in another way.
    """
    found: set[str] = set()
    for name, of in new.items():
        if name not in old or old[name].shape == of.shape:
            continue
        before, after = (one.moe_of(layer_of(name)) for one in (model, grown))
        here, there = before.num_choices, after.num_choices
        if ".moe.experts." in name:
            here, there = before.num_experts, after.num_experts
        if (old[name].shape, of.shape) != ((here, *of.shape[1:]), (there, *of.shape[1:])):
            raise ValueError(_not_rowed(model, name, old, new))
        found.add(name)
    if absent := old.keys() ^ new.keys():
        raise ValueError(_not_rowed(model, min(absent), old, new))
    if not any(".moe.router." in name for name in found):
        raise ValueError(_not_rowed(model, "nothing", old, new))
    return found


def _not_rowed(model: ModelConfig, name: str, old: Shapes, new: Shapes) -> str:
    shown = {
        f"with {number} experts": list(shapes[name].shape) if name in shapes else "absent"
        for number, shapes in (("as many", old), ("other", new))
    }
    return (
        f"model.moe.router._target_={model.moe.router.target} has no row for each expert: {name} is {shown}; "
        "use a router like TopKRouter, or set the option that this tensor's shape follows"
    )


def keep_experts(
    part: Part, kept: Sequence[Sequence[int]], top_k: int, origin: Mapping[str, Any]
) -> Growth:
    """The same model with the experts `kept` of each MoE layer alone, in their order.

    Their rows of the router stay as they are, and everything else too.
    """
    old = part.model
    model = with_experts(old, [len(ids) for ids in kept], top_k)
    new = shapes_of(model)
    return Growth(
        parts=[part],
        model=model,
        tensors=list(_kept(part, kept, new, rowed(old, model, part.shapes, new))),
        origin=origin,
    )


def _kept(
    part: Part, kept: Sequence[Sequence[int]], new: Shapes, rows: set[str]
) -> Iterator[NewTensor]:
    for name, of in new.items():
        if name not in rows:
            yield mean_of(name, of, [0])
            continue
        moe = part.model.moe_of(layer_of(name))
        ids = [*kept[part.model.moe_layers.index(layer_of(name))]]
        if ".moe.experts." not in name:
            ids += range(moe.num_experts, moe.num_choices)
        yield rows_of(name, of.dtype, of.shape[1:], [(0, name, row) for row in ids])
