"""The rules of data.path, data.sources and data.mixing, as far as the disk is not asked."""

import dataclasses
import re
from collections.abc import Iterator

from moesys.config.bounds import in_range
from moesys.config.errors import Problem
from moesys.config.memory_layers import layers_without_moe
from moesys.config.schema import RunConfig

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def find_source_problems(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.path is None and not data.sources:
        yield Problem(
            key="data.path",
            rule="is required, or data.sources",
            fix="set it to a folder of moesys prep",
        )
    if data.path == "":
        yield Problem(
            key="data.path", given="", rule="must not be empty", fix="name a folder of moesys prep"
        )
    if data.path is not None and data.sources:
        yield Problem(
            key="data.sources",
            given=", ".join(data.sources),
            rule=f"must not be set beside data.path={data.path}",
            fix="set data.path=null to mix several sources",
        )
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if not _NAME.fullmatch(name):
            yield Problem(
                key=key,
                rule="must be a word, since records and checkpoints have it in their keys",
                fix="use letters, digits, - and _",
            )
        if not source.path:
            yield Problem(
                key=f"{key}.path",
                given="",
                rule="must not be empty",
                fix="name a folder of moesys prep",
            )
        yield from in_range(f"{key}.weight", source.weight, above=0.0)
    yield from _mixing(config)


def mixing_warnings(config: RunConfig) -> Iterator[str]:
    """What nothing will read."""
    mixing = config.data.mixing
    for field in dataclasses.fields(mixing):
        value = getattr(mixing, field.name)
        if mixing.policy == "fixed" and value != field.default:
            yield f"data.mixing.{field.name}={value} has no effect with data.mixing.policy=fixed"
    if mixing.policy == "router_load" and mixing.every_steps >= config.train.steps:
        yield (
            f"data.mixing.every_steps={mixing.every_steps} is not below train.steps={config.train.steps}: "
            "the weights stay as they are"
        )


def _mixing(config: RunConfig) -> Iterator[Problem]:
    mixing, key = config.data.mixing, "data.mixing"
    yield from in_range(f"{key}.every_steps", mixing.every_steps, 1)
    yield from in_range(f"{key}.eta", mixing.eta, above=0.0)
    yield from in_range(f"{key}.smoothing", mixing.smoothing, above=0.0, below=1.0)
    yield from in_range(f"{key}.tokens", mixing.tokens, 0)
    if mixing.policy == "fixed":
        return
    if len(config.data.sources) < 2:
        yield Problem(
            key=f"{key}.policy",
            given=mixing.policy,
            rule=f"needs two sources or more, and data.sources has {len(config.data.sources)}",
            fix="add sources, or use fixed",
        )
    if not len(config.model.moe_layers):
        yield Problem(
            key=f"{key}.policy",
            given=mixing.policy,
            rule=f"needs an MoE layer, and {layers_without_moe(config.model)} leaves none",
            fix="use fewer dense layers, or fixed",
        )
