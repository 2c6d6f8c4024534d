"""The rules of model.moe: numbers of experts and of what belongs to them. Pure."""

import dataclasses
from collections.abc import Iterator

from moesys.config.bounds import in_range, multiples_near
from moesys.config.errors import Problem
from moesys.config.layout import values_per_row
from moesys.config.memory_layers import layers_without_moe
from moesys.config.schema import ModelConfig, MoEConfig, RunConfig


def find_expert_problems(config: RunConfig) -> Iterator[Problem]:
    moe, path = config.model.moe, "model.moe"
    for key in ("num_experts", "top_k", "d_expert"):
        yield from in_range(f"{path}.{key}", getattr(moe, key), 1)
    for key in ("num_shared_experts", "zero_experts", "copy_experts", "constant_experts"):
        yield from in_range(f"{path}.{key}", getattr(moe, key), 0)
    if moe.d_latent is not None:
        yield from in_range(f"{path}.d_latent", moe.d_latent, 1)
    if moe.shared_gate != "none" and not moe.num_shared_experts:
        yield Problem(
            key=f"{path}.shared_gate",
            given=moe.shared_gate,
            rule=f"weighs shared experts, and {path}.num_shared_experts=0",
            fix=f"set {path}.num_shared_experts=1, or {path}.shared_gate=none",
        )
    yield from _pyramid(config.model)
    yield from _widths(moe)
    layers = {of_layer.num_experts: of_layer for of_layer in _layers(config.model)}
    fewest = layers[min(layers)]
    if moe.top_k > fewest.num_choices >= 1:
        yield Problem(
            key=f"{path}.top_k",
            given=moe.top_k,
            rule=f"must be at most {_number(fewest, moe)}",
            fix=f"use 1 to {fewest.num_experts}",
        )
    yield from _frozen(config, fewest)
    if moe.capacity_factor is not None:
        yield from in_range(f"{path}.capacity_factor", moe.capacity_factor, above=0.0)
    for field in dataclasses.fields(moe.balance):
        least = 1 if field.name == "device_groups" else 0
        value = getattr(moe.balance, field.name)
        yield from in_range(f"{path}.balance.{field.name}", value, least)
    groups = moe.balance.device_groups
    for of_layer in layers.values():
        if groups >= 1 and of_layer.num_choices % groups:
            has_null = of_layer.num_choices > of_layer.num_experts
            yield Problem(
                key=f"{path}.balance.device_groups",
                given=groups,
                rule=f"must divide the {of_layer.num_choices} experts, those without a feed-forward included"
                if has_null
                else f"must divide {_number(of_layer, moe)}",
                fix="use parallel.ep, or a number that divides",
            )
    if moe.expert_backend == "grouped_mm":
        per_row, d_model = values_per_row(config), config.model.d_row
        if d_model % per_row:
            yield Problem(
                key="model.d_model" if moe.d_latent is None else f"{path}.d_latent",
                given=d_model,
                rule=f"must be a multiple of {per_row} (rows of 16 bytes in "
                f"train.dtype={config.train.dtype}) for {path}.expert_backend=grouped_mm",
                fix=f"use {multiples_near(per_row, d_model)}, or {path}.expert_backend=loop",
            )


def _layers(model: ModelConfig) -> list[MoEConfig]:
    """Of each MoE layer, if experts_by_layer has their number; at least one."""
    numbers = model.moe.experts_by_layer
    if not numbers or len(numbers) != len(model.moe_layers):
        return [model.moe]
    return [model.moe_of(layer) for layer in model.moe_layers]


def _number(of_layer: MoEConfig, moe: MoEConfig) -> str:
    """Of experts in a layer, with the key that says it."""
    if moe.experts_by_layer is None:
        return f"model.moe.num_experts={of_layer.num_experts}"
    return f"the {of_layer.num_experts} of a layer in model.moe.experts_by_layer"


def _frozen(config: RunConfig, fewest: MoEConfig) -> Iterator[Problem]:
    """What is trained beside frozen experts, and what would move without a gradient."""
    frozen, moe = config.optim.frozen_experts, config.model.moe
    if frozen is None:
        return
    if not config.model.moe_layers:
        yield Problem(
            key="optim.frozen_experts",
            given=frozen,
            rule=f"leaves nothing to train with {layers_without_moe(config.model)}",
            fix="use null, or a model with experts",
        )
    elif not 0 <= frozen < fewest.num_experts:
        yield Problem(
            key="optim.frozen_experts",
            given=frozen,
            rule=f"must be below {_number(fewest, moe)}, or nothing is trained",
            fix=f"use 0 to {fewest.num_experts - 1}, or null",
        )
    for key, value in (
        ("balance.bias_update_rate", moe.balance.bias_update_rate),
        ("expert_widths", moe.expert_widths),
        *((key, getattr(moe, key)) for key in ("zero_experts", "copy_experts", "constant_experts")),
    ):
        if value:
            off = "null" if key == "expert_widths" else "0"
            yield Problem(
                key=f"model.moe.{key}",
                given=value,
                rule=f"must be {off} with optim.frozen_experts={frozen}: it is no part's own",
                fix=f"use {off}, or optim.frozen_experts=null",
            )


def _pyramid(model: ModelConfig) -> Iterator[Problem]:
    numbers, key = model.moe.experts_by_layer, "model.moe.experts_by_layer"
    if numbers is None:
        return
    given, num_layers = list(numbers), len(model.moe_layers)
    if model.share_depth != "none":
        yield Problem(
            key=key,
            given=given,
            rule=f"makes layers differ, and model.share_depth={model.share_depth} gives them one set of experts",
            fix=f"use {key}=null, or model.share_depth=none",
        )
    if len(numbers) != num_layers:
        yield Problem(
            key=key,
            given=given,
            rule=f"must have a number for each of the {num_layers} MoE layers, and has {len(numbers)}",
            fix=f"write {num_layers} numbers, or null for model.moe.num_experts in every layer",
        )
    elif any(number < 1 for number in numbers):
        yield Problem(
            key=key,
            given=given,
            rule="must be numbers of at least 1",
            fix="use multiples of parallel.ep",
        )
    elif numbers and max(numbers) != model.moe.num_experts:
        yield Problem(
            key="model.moe.num_experts",
            given=model.moe.num_experts,
            rule=f"must be the largest of {key}={given}",
            fix=f"use {max(numbers)}",
        )


def _widths(moe: MoEConfig) -> Iterator[Problem]:
    key = "model.moe.expert_widths"
    if moe.expert_widths is None:
        if coefficient := moe.balance.width_loss_coef:
            yield Problem(
                key="model.moe.balance.width_loss_coef",
                given=coefficient,
                rule=f"weighs experts by their widths, and {key}=null",
                fix=f"set {key}, or the coefficient to 0",
            )
        return
    given = list(moe.expert_widths)
    if not given or min(given) < 1:
        rule, fix = "must be widths of at least 1", "write a list, or null for model.moe.d_expert"
        yield Problem(key=key, given=given, rule=rule, fix=fix)
    elif sum(given) != moe.d_expert * len(given):
        mean = sum(given) / len(given)
        yield Problem(
            key="model.moe.d_expert",
            given=moe.d_expert,
            rule=f"must be the mean of {key}={given}, {mean:g}",
            fix=f"use {mean:g}" if mean.is_integer() else "change a width: the mean must be whole",
        )
