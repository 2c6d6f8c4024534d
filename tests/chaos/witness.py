"""What a job's processes hold while it trains and restarts: seen from outside, start by start."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from moesys.chaos.faults import parse_faults
from moesys.chaos.job import Command, Watched, run_job
from moesys.chaos.outcome import Event, Sample
from moesys.chaos.processes import SHARED_MEMORY, sample, with_variable
from tests.train.launched import overrides

_EVERY_STEPS = 3
"""A look reads all of /proc."""


@dataclass
class Witness:
    """Looks at rank 0 and its agent at some steps; hand `see` to run_job."""

    run_dir: Path
    ranks: list[list[Sample]] = field(default_factory=list)
    """Of rank 0, by start of the ranks."""
    agents: list[list[Sample]] = field(default_factory=list)
    """Of the agent, by start of the ranks."""
    processes: set[int] = field(default_factory=set)
    """All of the job that were seen."""
    _steps: int = 0

    def see(self, event: Event) -> None:
        if event.kind == "start":
            self.ranks.append([])
            self.agents.append([])
        self._steps += event.kind == "step"
        if event.kind != "step" or self._steps % _EVERY_STEPS:
            return
        ours = with_variable("MOESYS_CHAOS_RUN", str(self.run_dir.resolve()))
        self.processes |= set(ours)
        for process in ours:
            try:
                found = psutil.Process(process)
                is_rank_0, agent = found.environ().get("RANK") == "0", found.ppid()
            except psutil.Error:
                continue  # it has just ended
            if is_rank_0 and (mine := sample(process)) and (its := sample(agent)):
                self.ranks[-1].append(mine)
                self.agents[-1].append(its)
                return

    def shared_memory_left(self) -> list[str]:
        """Entries of /dev/shm that are named by one of the job's processes, as torch and multiprocessing name them."""
        ours = {str(process) for process in self.processes}
        return [
            path.name
            for path in SHARED_MEMORY.iterdir()
            if ours & set(re.findall(r"\d+", path.name))
        ]


def train(
    data: Path, run_dir: Path, faults: str, *, steps: int, nproc: int = 2
) -> tuple[Watched, Witness]:
    """A job with `faults`, and who saw it."""
    words = overrides(run_dir, data, f"parallel.ep={nproc}", f"train.steps={steps}")
    command = Command(
        nproc=nproc,
        overrides=[word for word in words if not word.startswith("run.dir=")],
        max_restarts=2 * faults.count("step="),
        stall_s=600.0,
    )
    witness = Witness(run_dir)
    return run_job(command, run_dir, parse_faults(faults), on_event=witness.see), witness
