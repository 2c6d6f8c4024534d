"""Build a user's class from its import path and options."""

import importlib
from typing import Any

from torch import nn

from moesys.config.schema import ComponentConfig


def build_component(component: ComponentConfig, **fixed: Any) -> nn.Module:
    """`component.target(**fixed, **component.options)`; the target must be a torch module class.

    Raises ValueError naming the path when it cannot be imported or is not a module class.
    """
    module_name, _, class_name = component.target.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={component.target} cannot be imported: {error}") from error
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise ValueError(f"_target_={component.target} must be a subclass of torch.nn.Module")
    return target(**fixed, **component.options)
