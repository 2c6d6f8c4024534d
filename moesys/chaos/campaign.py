"""Jobs with faults beside one without: their run folders, what is said meanwhile, and the table over all kinds."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moesys.chaos.faults import Fault, spread
from moesys.chaos.job import Command, Watched, run_job
from moesys.chaos.outcome import Event, Outcome, Row, first_difference, row_of, survived_pct
from moesys.report.numbers import duration
from moesys.report.records import read_records
from moesys.train.metrics import FILE_NAME

Say = Callable[[str], None]
"""Takes a line for a person."""
_SPARE_STEPS = 4
"""After the last fault."""


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The job without a fault, in RUN/plain."""

    watched: Watched
    checkpoint_bytes: int
    """Of the largest; 0 without any."""
    step_s: float
    """The median step."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A job with faults beside the plain one."""

    name: str
    faults: tuple[Fault, ...]
    watched: Watched
    first_difference: int | None
    """The first step whose loss is another than the plain job's; None if all are bitwise equal."""

    @property
    def survived_pct(self) -> float:
        """Of the faults that happened."""
        happened = [outcome for outcome in self.watched.outcomes if outcome.happened]
        return 100 * sum(o.survived for o in happened) / len(happened) if happened else 0.0

    def row(self) -> Row:
        """Its line in the table."""
        return row_of(self.name, self.watched.outcomes, exact=self.first_difference is None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        watched = self.watched
        return {
            "name": self.name,
            "run_dir": str(watched.run_dir),
            "outcomes": [
                {**asdict(o), "fault": str(o.fault), "survived": o.survived}
                for o in watched.outcomes
            ],
            "survived_pct": self.survived_pct,
            "losses_equal": self.first_difference is None,
            "first_difference": self.first_difference,
            "exit_code": watched.exit_code,
            "launches": watched.launches,
            "wall_s": watched.wall_s,
            "goodput_pct": watched.goodput_pct,
            "leaks": asdict(watched.leaks),
            "grown": None if watched.grown is None else asdict(watched.grown),
        }


def with_steps(command: Command, steps: int) -> Command:
    """The same job, `steps` long."""
    return replace(command, overrides=[*command.overrides, f"train.steps={steps}"])


def run_plain(command: Command, folder: Path, say: Say) -> Plain:
    """The undisturbed job. Raises ValueError if it does not end well: what faults do could not be told."""
    say(f"without faults, in {folder / 'plain'}")
    watched = run_job(command, folder / "plain")
    if watched.exit_code != 0:
        raise ValueError(
            f"the job fails without any fault, exit code {watched.exit_code}: see "
            f"{folder / 'plain' / 'chaos' / 'output.log'}"
        )
    records = list(read_records(watched.run_dir / FILE_NAME))
    return Plain(
        watched=watched,
        checkpoint_bytes=max((r["bytes"] for r in records if r["kind"] == "checkpoint"), default=0),
        step_s=statistics.median(r["step_ms"] / 1e3 for r in records if r["kind"] == "train"),
    )


def run_faulted(
    command: Command, folder: Path, name: str, faults: Sequence[Fault], plain: Plain, say: Say
) -> Tried:
    """The job with `faults`, in FOLDER/NAME, and how its losses differ from the plain one's."""
    progress = Progress(say, name, faults)
    watched = run_job(
        command,
        folder / name,
        faults,
        checkpoint_bytes=plain.checkpoint_bytes,
        on_event=progress.see,
    )
    for outcome in watched.outcomes:
        say(f"{name}: {told(outcome)}")
    return Tried(
        name=name,
        faults=tuple(faults),
        watched=watched,
        first_difference=first_difference(plain.watched.losses, watched.losses),
    )


def table_faults(
    kinds: Sequence[str],
    seed: int,
    count: int,
    *,
    world_size: int,
    every_steps: int,
    phases: Sequence[str],
) -> dict[str, tuple[Fault, ...]]:
    """By kind, `count` faults each, one after the other in one job. Pure."""
    return {
        kind: spread(
            seed, kind, count, world_size=world_size, every_steps=every_steps, phases=phases
        )
        for kind in kinds
    }


def table_steps(faults: Mapping[str, Sequence[Fault]], every_steps: int) -> int:
    """How long a job must be for the faults of every kind, each with room to recover."""
    last = max((fault.step for of_kind in faults.values() for fault in of_kind), default=0)
    return last + 2 * every_steps + _SPARE_STEPS


def run_table(
    command: Command, folder: Path, faults: Mapping[str, Sequence[Fault]], plain: Plain, say: Say
) -> list[Tried]:
    """One job for each kind."""
    return [
        run_faulted(command, folder, kind, of_kind, plain, say) for kind, of_kind in faults.items()
    ]


def headline(tried: Sequence[Tried]) -> dict[str, float]:
    """The figures of a table that a release is judged by; those of kinds that it has."""
    rows = {one.name: one.row() for one in tried}
    figures = {"faults_survived_pct": survived_pct(list(rows.values()))}
    for kind, name in (("kill", "kill"), ("stop", "hang")):
        for what in ("found_s", "back_s"):
            if (value := rows.get(kind, {}).get(what)) is not None:
                figures[f"{name}_{what}"] = value
    return figures


def told(outcome: Outcome) -> str:
    """What became of a fault, in one line."""
    if not outcome.happened:
        return f"{outcome.fault}: did not happen"
    found = (
        "noticed by nobody"
        if outcome.found_s is None
        else f"found after {outcome.found_s:.2f} s ({outcome.found_by[:60]})"
    )
    if outcome.back_s is not None:
        back = f"next step after {outcome.back_s:.2f} s, {outcome.steps_lost} steps lost"
    else:
        back = "the next fault came first" if outcome.is_overtaken else "no step after it"
    relaunched = " by a new launch" if outcome.relaunches else ""
    return f"{outcome.fault}: {found}, {back}{relaunched}"


@dataclass
class Progress:
    """Says each fault as it happens, and about how long the rest will take."""

    say: Say
    name: str
    faults: Sequence[Fault]
    began_s: float = field(default_factory=time.monotonic)
    num_done: int = 0

    def see(self, event: Event) -> None:
        if event.kind != "fault":
            return
        self.num_done += 1
        left = len(self.faults) - self.num_done
        left_s = (time.monotonic() - self.began_s) / self.num_done * left
        self.say(
            f"{self.name}: [{self.num_done}/{len(self.faults)}] {self.faults[event.ordinal]}; "
            f"about {duration(left_s)} left"
        )
