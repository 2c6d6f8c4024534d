"""srun hands a signal to every process of a task: what a rank has started, as a compiler, outlives it."""

import signal
import subprocess
import sys

import pytest

RANK = """
import os, signal, subprocess, sys, time
from moesys.train.signals import StopRequest

number = signal.Signals(int(sys.argv[1]))
with StopRequest() as stop:
    stop.begin_training()
    code = "import time; print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(number)
    os.kill(os.getpid(), number)
    while stop.requested is None:
        time.sleep(0.01)
    time.sleep(0.3)
    print(stop.requested.name, child.poll())
    child.terminate()
    print(child.wait(60))
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_child_outlives_the_signal_that_its_rank_hears(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(int(number))], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [number.name, "None", "-15"], done.stderr
