"""The rules of model.memory_layers. Pure."""

from collections.abc import Iterator

from moesys.config.bounds import in_range
from moesys.config.errors import Problem
from moesys.config.schema import MemoryLayersConfig, ModelConfig, RunConfig

_PATH = "model.memory_layers"
_MOST_VALUES = 2**31
"""What an int32 counts."""


def find_memory_layer_problems(config: RunConfig) -> Iterator[Problem]:
    memory = config.model.memory_layers
    if not memory.layers:
        return
    yield from _places(config.model)
    for key in ("num_keys", "top_k", "d_key", "d_value", "rank", "heads"):
        yield from in_range(f"{_PATH}.{key}", getattr(memory, key), 1)
    yield from in_range(f"{_PATH}.d_pre", memory.d_pre, 0)
    if memory.num_keys**2 >= _MOST_VALUES:
        yield Problem(
            key=f"{_PATH}.num_keys",
            given=memory.num_keys,
            rule=f"makes {memory.num_keys**2} values, which must be below 2^31",
            fix="use at most 46340",
        )
    if memory.top_k > memory.num_keys >= 1:
        yield Problem(
            key=f"{_PATH}.top_k",
            given=memory.top_k,
            rule=f"must be at most {_PATH}.num_keys={memory.num_keys}, of which so many rows and columns are candidates",
            fix=f"use 1 to {memory.num_keys}",
        )


def _places(model: ModelConfig) -> Iterator[Problem]:
    """Of layers that would be MoE, each once and in order."""
    given, first, last = list(model.memory_layers.layers), model.num_dense_layers, model.num_layers
    if given != sorted(set(given)) or not first <= given[0] <= given[-1] < last:
        yield Problem(
            key=f"{_PATH}.layers",
            given=given,
            rule=f"must be numbers of the decoder's layers that are not dense, {first} to {last - 1}, in order",
            fix=f"use some of {list(range(first, last))}",
        )


def layers_without_moe(model: ModelConfig) -> str:
    """The keys that leave no MoE layer, where there is none."""
    keys = f"model.num_dense_layers={model.num_dense_layers}"
    if memory := list(model.memory_layers.layers):
        keys += f" with {_PATH}.layers={memory}"
    return keys


def memory_layer_warnings(model: ModelConfig) -> Iterator[str]:
    """Keys that nothing reads."""
    memory = model.memory_layers
    if memory.layers:
        return
    for key, field in MemoryLayersConfig.__dataclass_fields__.items():
        if (value := getattr(memory, key)) != field.default:
            yield f"{_PATH}.{key}={value} has no effect with {_PATH}.layers=[]"
