"""The hand inside a rank: waits for the phase of the step, leaves a marker in the run folder, and acts.

    MOESYS_CHAOS='kill rank=1 step=40 phase=exchange' torchrun ... -m moesys.train ...

A marker RUN/chaos/NNNN.json is written before fault N of the list happens, and a fault that has one never happens
again: a job that is started again does not die at the same step for ever.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesys.chaos.acts import ChaosError, act_of, problem_here
from moesys.chaos.faults import Fault, parse_faults, phases_of, problems_in_run
from moesys.train.folder import write_text
from moesys.train.trainer import Trainer

VARIABLE = "MOESYS_CHAOS"
MARKERS = "chaos"
"""A folder in the run folder."""
_SAVING = re.compile(r"/step_(\d{8,})\.tmp-[0-9a-f]+/")


def arm(trainer: Trainer, environ: Mapping[str, str] = os.environ) -> None:
    """Let the faults that `environ` lists happen on this rank. Raises ValueError if some could never."""
    faults = parse_faults(environ[VARIABLE])
    config, process = trainer.config, trainer.run.process
    checkpoints = trainer.saver.directory
    problems = problems_in_run(
        faults,
        world_size=process.world_size,
        steps=config.train.steps,
        phases=phases_of(config),
    )
    problems += [text for fault in faults if (text := problem_here(fault, checkpoints))]
    if problems:
        raise ValueError("\n".join([f"{VARIABLE}: {len(problems)} problems", *problems]))
    injector = Injector(faults, trainer)
    if injector.pending:
        injector.observe()


def marker_path(run_dir: Path, ordinal: int) -> Path:
    return run_dir / MARKERS / f"{ordinal:04d}.json"


class Injector:
    """One rank's faults that have not happened yet."""

    def __init__(self, faults: Sequence[Fault], trainer: Trainer) -> None:
        self._trainer = trainer
        self._rank = trainer.run.process.rank
        self._run_dir = trainer.run.folder
        self.pending = {
            ordinal: fault
            for ordinal, fault in enumerate(faults)
            if fault.rank == self._rank and not marker_path(self._run_dir, ordinal).exists()
        }
        self._lock = threading.Lock()  # a save has its own thread

    def observe(self) -> None:
        """Be called at the phases that some fault waits for."""
        wanted = {fault.phase for fault in self.pending.values()}
        if wanted - {"exchange", "save"}:
            self._trainer.timer.on_enter = lambda name: self.enter(name, self._trainer.step)
        if "exchange" in wanted:
            self._observe_exchange()
        if "save" in wanted:
            sys.addaudithook(self._on_event)

    def enter(self, phase: str, step: int) -> None:
        """The rank begins `phase` of `step`."""
        for ordinal, fault in self._due(phase, step):
            what, act = act_of(fault, self._trainer)
            self._mark(ordinal, fault, step, what)
            act()

    def _due(self, phase: str, step: int) -> list[tuple[int, Fault]]:
        with self._lock:
            due = [
                (ordinal, fault)
                for ordinal, fault in self.pending.items()
                if fault.phase == phase and is_due(fault, step)
            ]
            for ordinal, _ in due:
                del self.pending[ordinal]
        return due

    def _mark(self, ordinal: int, fault: Fault, step: int, what: str) -> None:
        path = marker_path(self._run_dir, ordinal)
        path.parent.mkdir(parents=True, exist_ok=True)
        marker: dict[str, Any] = {
            "ordinal": ordinal,
            "fault": asdict(fault),
            "step": step,
            "what": what,
            "pid": os.getpid(),
            "monotonic_s": time.monotonic(),  # the same clock for all processes of a machine
            "unix_s": time.time(),
        }
        write_text(path, json.dumps(marker) + "\n")
        print(f"chaos: {fault}: {what}", file=sys.stderr, flush=True)

    def _observe_exchange(self) -> None:
        layers = self._trainer.run.model.moe_layers()
        dispatchers = [layer.dispatcher for layer in layers if layer.dispatcher.exchanges()]
        if not dispatchers:
            raise ChaosError(f"chaos: rank {self._rank} exchanges no rows: name another rank")
        first = dispatchers[0]
        dispatch = first.dispatch

        def observed(*arguments: Any) -> Any:
            if self._trainer.run.model.training:  # an evaluation is no step
                self.enter("exchange", self._trainer.step)
            return dispatch(*arguments)

        first.dispatch = observed  # pyright: ignore[reportAttributeAccessIssue]

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python is about to do something; of interest is a file of an unfinished checkpoint that is written."""
        if event != "open" or not self.pending or not isinstance(arguments[2], int):
            return
        if arguments[2] & os.O_CREAT and (match := _SAVING.search(str(arguments[0]))):
            self.enter("save", int(match[1]))


def is_due(fault: Fault, step: int) -> bool:
    """Whether `fault` happens in this step, of whose phase it waits for."""
    return step >= fault.step if fault.phase == "save" else step == fault.step
