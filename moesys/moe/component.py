"""Build a user's class from its import path and options."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from moesys.config.constructor import Constructor
from moesys.config.schema import ComponentConfig, MoEConfig
from moesys.moe.codec import Codec


def build_component(
    component: ComponentConfig, offered: Mapping[str, Any] | None = None, **fixed: Any
) -> nn.Module:
    """`component.target(**fixed, **component.options)`, with those of `offered` that its constructors name.

    The target must be a torch module class. Raises ValueError naming the path when it cannot be imported, is no module
    class, or does not take the options.
    """
    module_name, _, class_name = component.target.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={component.target} cannot be imported: {error}") from error
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise ValueError(f"_target_={component.target} must be a subclass of torch.nn.Module")
    named = Constructor(target).parameters
    wanted = {name: value for name, value in (offered or {}).items() if name in named}
    try:
        return target(**fixed, **wanted, **component.options)
    except TypeError as error:
        raise ValueError(
            f"_target_={component.target} does not take its options: {error}"
        ) from error


def build_router(config: MoEConfig, d_model: int, layer: int, num_layers: int) -> nn.Module:
    """The router of the `layer`-th of `num_layers` MoE layers. Raises ValueError as `build_component`."""
    return build_component(
        config.router,
        offered={"layer": layer, "num_layers": num_layers},
        d_model=d_model,
        num_experts=config.num_choices,
        top_k=config.top_k,
    )


def build_codec(component: ComponentConfig, d_model: int, layer: int) -> Codec:
    """The codec of the `layer`-th MoE layer. Raises ValueError as `build_component`, and for one with weights."""
    codec = build_component(component, offered={"layer": layer}, d_model=d_model)
    if any(True for _ in codec.parameters()):
        raise ValueError(f"_target_={component.target} has parameters, and a codec must have none")
    return cast(Codec, codec)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether it has a parameter of that name."""
    return name in inspect.signature(function).parameters
