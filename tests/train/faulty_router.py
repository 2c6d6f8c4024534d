"""A router that does what FAULT says, "raise RANK CALL", "kill RANK CALL", "wait RANK CALL SECONDS" or "wait all CALL SECONDS"."""

import os
import signal
import time

from moesys.moe.routers import TopKRouter


class FaultyRouter(TopKRouter):
    calls = 0

    def forward(self, x_TD, state=None):
        if self.training:
            self.calls += 1
            kind, rank, call, *seconds = os.environ["FAULT"].split()
            if rank in ("all", os.environ["RANK"]) and self.calls == int(call):
                if kind == "raise":
                    raise ArithmeticError("the poison works")
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(float(seconds[0]))
        return super().forward(x_TD, state)
