"""Files of what routers chose, one for each optimizer step: RUN/choices/STEP.npy, int16 [M, N, K].

Shapes: M MoE layers, N tokens of the step by their places in it, K experts per token.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = "choices"


def write_choices(run_dir: Path, step: int, choices_MNK: NDArray[np.int16]) -> None:
    """Beside, then renamed: a file is whole or not there."""
    path = run_dir / FOLDER / f"{step:08d}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            np.save(file, choices_MNK, allow_pickle=False)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def recorded_steps(run_dir: Path) -> list[Path]:
    """Files, first step to last."""
    return sorted((run_dir / FOLDER).glob("[0-9]*.npy"))


def open_choices(path: Path) -> NDArray[np.int16]:
    """[M, N, K], read where it is used. Raises ValueError for a file that is none."""
    try:
        choices_MNK = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of recorded choices: {error}") from error
    if choices_MNK.ndim != 3 or choices_MNK.dtype != np.int16:
        raise ValueError(f"{path} is no file of recorded choices: it must be int16 [M, N, K]")
    return choices_MNK
