"""`moesys` on the virtual cluster."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.slurm import SlurmCluster
from tests.launch.slurm_runs import WAIT_S
from tests.train.launched import ROOT


@pytest.fixture(scope="module")
def moesys(slurm: SlurmCluster) -> Callable[..., str]:
    """moesys(words..., code=0): what the command prints, in the root of the source tree, talking to the cluster."""

    def run(*words: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "moesys", *map(str, words)],
            cwd=ROOT,
            env=dict(slurm.environment),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
