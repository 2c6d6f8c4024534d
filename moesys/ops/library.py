"""Finds and loads the compiled ops (csrc/, built by setup.py) once, when this module is imported.

Without them, or on a device they were not built for, every op runs in torch: its version in
`reference.py`, or torch's own op where there is one. The same results, slower.
"""

from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent.parent / "libmoesys.so"
_BUILD = "`python setup.py build_ext --inplace`"


def _load() -> tuple[frozenset[str], str]:
    if not PATH.exists():
        return frozenset(), f"reference (slow): {PATH.name} is not built, run {_BUILD}"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        reason = str(error).replace("\n", " ")
        return frozenset(), f"reference (slow): {PATH.name} does not load ({reason}), run {_BUILD}"
    built = [
        device
        for device in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key("moesys::permute", device.upper())
    ]
    return frozenset([*built, "meta"]), f"compiled for {' and '.join(built)}"


_DEVICES, _STATUS = _load()


def status() -> str:
    """One line: which ops run, and what to do if they are the slow ones."""
    return f"moesys.ops: {_STATUS}"


def is_loaded() -> bool:
    """Whether the compiled ops exist in this process, for whatever device."""
    return bool(_DEVICES)


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether a compiled op takes this tensor; else the reference does."""
    return tensor.device.type in _DEVICES
