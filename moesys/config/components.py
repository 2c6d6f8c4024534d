"""Whether the classes that a configuration names exist and take the options given.

Importing a component imports what it imports (torch, mostly), so this is a file of its own.
"""

import importlib
import importlib.util
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moesys.config.build import check_value
from moesys.config.constructor import Constructor
from moesys.config.errors import Problem, did_you_mean
from moesys.config.pipeline import find_sharing_problems
from moesys.config.schema import ComponentConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Of component."""

    name: str
    fixed: Mapping[str, str]
    """What the model always passes beside its options, and the key that sets it."""
    offered: tuple[str, ...]
    """What it passes to those that name it."""
    folder: str
    """Of configs/, with examples."""


_ROUTER = _Kind(
    name="router",
    fixed={
        "d_model": "model.d_model",
        "num_experts": "model.moe.num_experts",
        "top_k": "model.moe.top_k",
    },
    offered=("layer", "num_layers"),
    folder="configs/router",
)
_CODEC = _Kind(
    name="codec", fixed={"d_model": "model.d_model"}, offered=("layer",), folder="configs/codec"
)


def find_component_problems(config: RunConfig) -> Iterator[Problem]:
    key = "model.moe.router"
    router = yield from _check(config.model.moe.router, key, _ROUTER)
    if router is not None:
        yield from _check_sharing(config, f"{key}._target_", router)
        yield from _check_sequences(config, f"{key}._target_", router)
    for key, component in config.dispatch.codecs.items():
        codec = yield from _check(component, key, _CODEC)
        if codec is not None:
            yield from _check_built(codec, component, key, config.model.d_model)
    for package, key, wanted in (
        ("wandb", "metrics.wandb", config.metrics.wandb != "off"),
        ("tensorboard", "metrics.tensorboard", config.metrics.tensorboard),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            yield Problem(
                key=key,
                given=getattr(config.metrics, package),
                rule=f"needs the package {package}, which is not installed",
                fix=f"pip install {package}, or leave {key} off",
            )


def _check(
    component: ComponentConfig, key: str, kind: _Kind
) -> Generator[Problem, None, type | None]:
    """Returns the class, if it is one."""
    target = f"{key}._target_"
    module_name, _, class_name = component.target.rpartition(".")
    if not module_name:
        yield Problem(
            key=target,
            given=component.target,
            rule="must be the import path of a class, with its module",
            fix="write package.module.ClassName",
        )
        return None
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            fix = "check the spelling; the folder to start from must be the working folder or installed"
        else:
            fix = f"install {error.name}, which it imports"
        yield Problem(
            key=target,
            given=component.target,
            rule=f"must be importable ({error})",
            fix=fix,
        )
        return None
    except Exception as error:  # a user's module may raise anything at import
        yield Problem(
            key=target,
            given=component.target,
            rule=f"must be importable (importing {module_name} raised {type(error).__name__}: {error})",
            fix=f"correct {module_name}",
        )
        return None
    found = getattr(module, class_name, None)
    classes = [name for name, value in vars(module).items() if _is_module_class(value)]
    fix = (
        did_you_mean(class_name, classes)
        if classes
        else f"name a {kind.name}, as {kind.folder} does"
    )
    if found is None:
        yield Problem(
            key=target,
            given=component.target,
            rule=f"must name a class of {module_name}",
            fix=fix,
        )
    elif not _is_module_class(found):
        yield Problem(
            key=target,
            given=component.target,
            rule="must be a subclass of torch.nn.Module",
            fix=fix,
        )
    else:
        yield from _check_options(key, found, component, kind)
        return found
    return None


def _check_built(codec: type, config: ComponentConfig, key: str, d_model: int) -> Iterator[Problem]:
    """What its constructor itself refuses."""
    try:
        codec(d_model=d_model, **config.options)
    except ValueError as error:
        fix = f"correct the options of {config.target}"
        yield Problem(key=key, rule=f"is refused: {error}", fix=fix)
    except TypeError:
        return  # an option is missing or unknown, which is told


def _check_sharing(config: RunConfig, target: str, router: type) -> Iterator[Problem]:
    """What layers have one of, and what each has of its own."""
    given = config.model.moe.router.target
    if config.model.share_depth == "none":
        if getattr(router, "over_depth", ()):
            off = "a router that is each layer's own"
            yield from find_sharing_problems(config, target, given, off)
    elif "layer" in Constructor(router).parameters:
        yield Problem(
            key=target,
            given=given,
            rule="is another router in each layer, and model.share_depth gives them one",
            fix="use model.share_depth=none, or a router without the argument layer",
        )


def _check_sequences(config: RunConfig, target: str, router: type) -> Iterator[Problem]:
    if config.batch.is_planned and getattr(router, "needs_whole_sequences", False):
        yield Problem(
            key=target,
            given=config.model.moe.router.target,
            rule=f"looks at whole sequences, of which ranks have pieces with batch.policy={config.batch.policy}",
            fix="use another router, e.g. router=topk_softmax, or batch.policy=samples",
        )


def _is_module_class(value: Any) -> bool:
    """By name, because this file does not import torch."""
    return isinstance(value, type) and any(
        base.__module__ == "torch.nn.modules.module" and base.__name__ == "Module"
        for base in value.__mro__[1:]
    )


def _check_options(
    key: str, component: type, config: ComponentConfig, kind: _Kind
) -> Iterator[Problem]:
    constructor = Constructor(component)
    passed = (*kind.fixed, *kind.offered)
    options = [name for name in constructor.parameters if name not in passed]
    for name in kind.fixed:
        if name not in constructor.parameters and not constructor.takes_any:
            yield Problem(
                key=f"{key}._target_",
                given=config.target,
                rule=f"must take {name} in its constructor (as {', '.join(kind.fixed)} are always passed)",
                fix=f"add the keyword argument {name}: int",
            )
    for name in constructor.required:
        if name not in passed and name not in config.options:
            yield Problem(
                key=f"{key}.{name}",
                rule=f"is required by {config.target}",
                fix=f"set it: {key}.{name}=...",
            )
    for name, value in config.options.items():
        if name in passed:
            fix = "remove it"
            if name in kind.fixed:
                fix += f" and set {kind.fixed[name]}"
            yield Problem(key=f"{key}.{name}", given=value, rule="is passed by the model", fix=fix)
        elif name in constructor.parameters:
            yield from check_value(constructor.hints.get(name), value, f"{key}.{name}")
        elif not constructor.takes_any:
            yield Problem(
                key=f"{key}.{name}",
                given=value,
                rule=f"is not an option of {config.target}",
                fix=did_you_mean(name, options),
            )
