"""A router that waits a moment as long as a file is there: a test then has time to do something to a run."""

import os
import time
from contextlib import suppress
from pathlib import Path

from tests.train.noisy_router import NoisyRouter

VARIABLE = "MOESYS_TEST_BRAKE"
"""Names the file, which says how many seconds."""


class BrakedRouter(NoisyRouter):
    def forward(self, x_TD, state=None):
        if self.training and VARIABLE in os.environ:
            with suppress(FileNotFoundError):
                time.sleep(float(Path(os.environ[VARIABLE]).read_text()))
        return super().forward(x_TD, state)
