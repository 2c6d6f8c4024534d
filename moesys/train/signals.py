"""Signals ask for a stop: SIGTERM (schedulers, torchrun), SIGINT (a person), SIGUSR1 and SIGUSR2 (`sbatch --signal`).

Before there is anything to save, the first one ends the process at once; in training it ends the step.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from moesys.train.exit_codes import STOPPED_EXIT_CODE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

NOT_FOR_CHILDREN = (signal.SIGUSR1, signal.SIGUSR2)
"""srun hands a signal to every process of a task, and a compiler that a rank has started would die of these."""


def leave_on_signals() -> None:
    """From the first line of a process until a StopRequest, or torchrun, handles signals: one ends it, with 75."""
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(1, f"moesys: {name} before the first step: nothing to save\n".encode())
    os._exit(STOPPED_EXIT_CODE)


class StopRequest:
    """Handles the signals inside a `with` block, of the main thread; `requested` is read once per step.

    A second SIGINT interrupts at once. Once a stop was requested the handlers stay after the block: the
    process is about to end, and a launcher that sends the signal again must not change its exit code.

    Processes that this thread starts inside the block have SIGUSR1 and SIGUSR2 blocked.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        """The first signal."""
        self.before_leaving: Callable[[], None] = lambda: None
        """Called, in a thread, where a signal ends the process before the first step."""
        self._requested_at_s = 0.0
        self._is_training = False
        self._previous: dict[int, object] = {}

    @property
    def elapsed_s(self) -> float:
        """Since the first signal; 0 before."""
        return time.monotonic() - self._requested_at_s if self.requested else 0.0

    def begin_training(self) -> None:
        """From here on a signal waits for the end of the step."""
        self._is_training = True

    def __enter__(self) -> "StopRequest":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._former_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        self._thread = threading.Thread(target=self._leave_early, name="signals", daemon=True)
        self._thread.start()
        # A mask is inherited, a handler is not. The thread still takes them.
        self._former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_CHILDREN)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.requested:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._former_mask)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)
        for number, handler in self._previous.items():
            # Whoever has taken it over meanwhile (a watch that explains an error) keeps it.
            if not self.requested and signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        if not self.requested:
            self._requested_at_s = time.monotonic()
            self.requested = signal.Signals(number)

    def _leave_early(self) -> None:
        """A thread: the main one may wait in a call for other ranks, which handlers do not interrupt."""
        while received := os.read(self._read_end, 1):
            if received[0] in STOP_SIGNALS and not self._is_training:
                name = signal.Signals(received[0]).name
                print(f"moesys: {name} before the first step: nothing to save", flush=True)
                with suppress(Exception):
                    self.before_leaving()
                os._exit(STOPPED_EXIT_CODE)
