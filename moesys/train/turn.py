"""A job's turn to write in a run folder: the lock, the generation, what a former job left unfinished, the status."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesys.checkpoint.errors import Superseded
from moesys.checkpoint.folder import clear
from moesys.launch.status import FILE_NAME, State, job_id_of, write_status
from moesys.train.fence import Generation, claim
from moesys.train.folder import may_fail, must_begin, sole_writer
from moesys.train.metrics import clear_unfinished


class Turn:
    """What rank 0 asks before it changes the folder, and where it says how the run goes."""

    def __init__(self, folder: Path, generation: Generation, job_id: str | None) -> None:
        self.folder = folder
        self.generation = generation
        self.job_id = job_id

    def check(self) -> None:
        """Raises Superseded once a later start has claimed the folder."""
        self.generation.check()

    def say(self, state: State, reason: str = "") -> None:
        """Write RUN/status.json, where the disk takes it. Raises Superseded as `check`."""
        with may_fail(self.folder / FILE_NAME, f"the run is {state}"):
            self.check()
            write_status(self.folder, state, job_id=self.job_id, reason=reason)

    def say_failed(self, reason: str) -> None:
        """As `say`, but whatever prevents it must not hide the failure."""
        with suppress(Superseded, OSError, ValueError):
            self.say("failed", reason)


@contextmanager
def turn_to_write(folder: Path, explain: Callable[[BaseException], str] = str) -> Iterator[Turn]:
    """Claim the folder and clear it for a run that begins; an error inside becomes its status, as `explain` puts it.

    Raises ValueError naming the job that has the folder, if it is one of this machine.
    """
    with sole_writer(folder):
        job_id = job_id_of(os.environ)
        with must_begin(folder):
            turn = Turn(folder, claim(folder, job_id=job_id), job_id)
            turn.check()
            clear(folder / "checkpoints")  # after the claim: see `fence`
            clear_unfinished(folder)
        turn.say("running")
        try:
            yield turn
        except BaseException as error:
            turn.say_failed(explain(error))
            raise
