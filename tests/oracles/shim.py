"""CUDA calls answered by the CPU, so that Megatron runs on gloo ranks: for tests, never an engine.

    with cuda_on_cpu():
        ...build and run Megatron...

Only inside a rank's own process (`run_ranks`), and undone at the end. A Stream or Event does nothing, the device
"cuda" is the CPU, and so is the current device.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Nothing:
    """A stream or event of a device that works in order: every method does nothing and returns another."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: _Nothing()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Nothing)

    def __hash__(self) -> int:
        return 0


class _OnCpu(TorchFunctionMode):
    """Every torch function that is asked for the device "cuda" gives the CPU instead; types are named as on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(x) for x in args)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    is_name = isinstance(value, str) and value.startswith("cuda")
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return CPU if is_name or is_cuda else value


_torchs_all_to_all_single = dist.all_to_all_single


def _all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Megatron makes arrays of splits that it brings from a GPU, and leaves those of a CPU tensors."""
    return _torchs_all_to_all_single(
        output,
        input,
        _as_list(output_split_sizes),
        _as_list(input_split_sizes),
        group=group,
        async_op=async_op,
    )


def _as_list(splits: Any) -> list[int] | None:
    return None if splits is None else [int(size) for size in splits]


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Answer torch.cuda from the CPU until the end of the block."""
    answers = {
        "current_device": lambda: CPU,
        "synchronize": lambda *_: None,
        "Stream": _Nothing,
        "Event": _Nothing,
        "stream": lambda _: nullcontext(),
        "current_stream": _Nothing,
        "default_stream": _Nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "is_current_stream_capturing": lambda: False,
        "nvtx": _Nothing(),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(dist, "all_to_all_single", _all_to_all_single))
        stack.enter_context(patch.dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1"))
        stack.enter_context(_OnCpu())
        yield
