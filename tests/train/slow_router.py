"""A router that takes SLOW_S seconds longer on rank SLOW_RANK, at every call in training."""

import os
import time

from moesys.moe.routers import TopKRouter


class SlowRouter(TopKRouter):
    def forward(self, x_TD, state=None):
        if self.training and os.environ["RANK"] == os.environ["SLOW_RANK"]:
            time.sleep(float(os.environ["SLOW_S"]))
        return super().forward(x_TD, state)
