"""Faults on purpose in real jobs of two ranks, how long jobs take to start, and what a run loses to both.

Its parts, in order, are each kind of fault (`--seeds` times in one job, one after the other; the seed decides rank, step and
phase), then

    save_stall   what steps wait for saves, on quickstart's model
    start_up     from `moesys train` to the end of the first step, by number of ranks, and its split
    goodput      of a job with a fault every 20 restart times
    requeues     five in a row on a real Slurm; left out where none can be started
    mutations    wrong configurations and environments, each tried with the real command

A part is kept when it is measured (benchmarks/kept.py). `--only` measures some parts, and a later run finds them.
"""

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.kept import KeptParts
from benchmarks.own_text import VOCAB_SIZE, prepared
from benchmarks.requeues import REQUEUES, requeue_five_times
from benchmarks.results import Cell, Result
from benchmarks.start_up import measure_starts
from moesys.chaos import cut
from moesys.chaos.campaign import run_faulted, run_plain, table_faults, table_steps, with_steps
from moesys.chaos.faults import KINDS, PHASES, Fault, spread
from moesys.chaos.job import Command, Watched, run_job
from moesys.chaos.outcome import survived_pct
from moesys.report.numbers import duration
from moesys.report.records import read_records
from moesys.testing.mutations import MUTATIONS
from moesys.testing.refusals import Scene, faults
from moesys.train.metrics import FILE_NAME
from tests.launch.slurm import missing

DESCRIPTION = "faults found, back and exact; save stall; start-up time; goodput under faults; requeues; refusals"
RESULT = "reliability"

SEEDS = 20
RANKS = 2
WORLDS = (1, 2, 4, 8)
RESTART_TIMES_BETWEEN_FAULTS = 20
GOODPUT_KINDS = ("kill", "exception", "corrupt_checkpoint")
"""Those that end the ranks at once: a restart time is one of these."""
JOB = (
    *("model=tiny", f"model.vocab_size={VOCAB_SIZE}", "data.seq_len=32", "train.eval_tokens=256"),
    *("train.global_batch_tokens=512", "train.micro_batch_tokens=64"),
    *("schedule=constant", "schedule.warmup_steps=0"),
    # Jobs that measure may choose differently, and backends round differently.
    "model.moe.expert_backend=grouped_mm",
)
EVERY_STEPS = 5
"""Between checkpoints, in the jobs of the table."""
LASTING_EVERY_STEPS = 40
"""For faults of disks: steps do not wait for them, and the next fault must come when one is over."""
LASTING = ("disk_full", "read_only")
GOODPUT_EVERY_STEPS = 50
STALL_STEPS, STALL_EVERY_STEPS = 60, 10
OTHERS = ("save_stall", "start_up", "goodput", "requeues", "mutations")
PARTS = (*KINDS, *OTHERS)
QUICK_PARTS = ("kill", "mutations")
QUICK_MUTATIONS = 3

OF_A_ROW = ("goodput_pct", "requeues_exact", "mutations_refused")
"""Headline figures that are cells."""

Row = dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every part is given."""

    folder: Path
    """For its jobs."""
    data: Path
    seeds: int
    quick: bool
    say: Callable[[str], None]

    def overrides(self, *more: str) -> list[str]:
        """Of the job that all parts but one train."""
        return [*JOB, f"data.path={self.data}", *more]

    def command(self, *more: str, max_restarts: int = 0, stall_s: float = 180.0) -> Command:
        return Command(
            nproc=RANKS,
            overrides=self.overrides("parallel.ep=2", *more),
            max_restarts=max_restarts,
            stall_s=stall_s,
        )


def run(
    quick: bool,
    progress: Callable[[str], None],
    seeds: int = SEEDS,
    only: Sequence[str] = (),
) -> Result:
    """`seeds` faults of each kind; `only` these of PARTS. Whole with all parts and at least 20 seeds.

    Raises:
        ValueError: an unknown part, no seed, or a job that fails without a fault.
    """
    if unknown := [part for part in only if part not in PARTS]:
        raise ValueError(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1")
    seeds = 1 if quick else seeds
    wanted = [part for part in (only or (QUICK_PARTS if quick else PARTS)) if part in PARTS]
    kept = KeptParts(RESULT, {"seeds": seeds, "quick": quick})
    found: dict[str, list[Row]] = {}
    clock = Clock(seeds, wanted)
    for part in wanted:
        rows = kept.get(part)
        if rows is None:
            progress(f"{part}: {clock.left()}")
            folder = kept.runs / part
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
            folder.mkdir(parents=True)
            data = prepared(kept.runs / "data")
            bench = Bench(folder=folder, data=data, seeds=seeds, quick=quick, say=progress)
            began_s = time.monotonic()
            rows = measure(bench, part)
            clock.add(part, time.monotonic() - began_s)
            kept.put(part, rows)
            shutil.rmtree(folder)
        else:
            clock.skip(part)
            progress(f"{part}: measured before")
        found[part] = rows
    is_whole = not quick and set(wanted) == set(PARTS) and seeds >= SEEDS
    if is_whole:
        kept.clear()
    return Result(
        # A result has at least one figure.
        headline=headline(found) or {"parts": float(len(found))},
        rows=[row for rows in found.values() for row in rows],
        is_whole=is_whole,
    )


def measure(bench: Bench, part: str) -> list[Row]:
    """The rows of one part."""
    others: Mapping[str, Callable[[Bench], list[Row]]] = {
        "save_stall": save_stall,
        "start_up": start_up,
        "goodput": goodput,
        "requeues": requeues,
        "mutations": mutations,
    }
    return others[part](bench) if part in others else fault_rows(bench, part)


def headline(found: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """The figures that those parts give. Pure."""
    table = [row for kind in KINDS for row in found.get(kind, ()) if "survived" in row]
    figures: dict[str, Cell] = {}
    if table:
        figures["faults_survived_pct"] = survived_pct(table)
    for kind, name in (("kill", "kill"), ("stop", "hang")):
        for row in found.get(kind, ()):
            figures |= {f"{name}_{what}": row[what] for what in ("found_s", "back_s")}
    for part in ("goodput", "requeues", "mutations"):
        for row in found.get(part, ()):
            figures |= {name: row[name] for name in OF_A_ROW if name in row}
    for row in found.get("start_up", ()):
        if row["ranks"] == RANKS:
            figures["submit_to_first_step_s"] = row["total_s"]
    return {name: float(value) for name, value in figures.items() if value is not None}


def fault_rows(bench: Bench, kind: str) -> list[Row]:
    """The line of the table about faults of one kind; why there is none where this machine cannot have it."""
    reason = cut.why_not() if kind == "partition" else None
    if kind == "read_only" and os.geteuid() != 0:
        reason = "a file system of its own takes root"
    if reason is not None:
        return [_left_out(bench, kind, reason)]
    spacing = LASTING_EVERY_STEPS if kind in LASTING else EVERY_STEPS
    faults = table_faults(
        [kind], 0, bench.seeds, world_size=RANKS, every_steps=spacing, phases=PHASES
    )
    steps = table_steps(faults, spacing)
    keys = [f"checkpoint.every_steps={EVERY_STEPS}", "anomaly.replicas_every_steps=1"]
    command = with_steps(bench.command(*keys, max_restarts=2 * bench.seeds), steps)
    plain = run_plain(command, bench.folder, bench.say)
    tried = run_faulted(command, bench.folder, kind, faults[kind], plain, bench.say)
    return [tried.row()]


def save_stall(bench: Bench) -> list[Row]:
    """What steps wait for saves of quickstart's 10 M parameters."""
    command = Command(
        nproc=RANKS,
        overrides=[
            *("experiment=quickstart", f"model.vocab_size={VOCAB_SIZE}", f"data.path={bench.data}"),
            *("train.eval_tokens=2048", f"checkpoint.every_steps={STALL_EVERY_STEPS}"),
            *("train.eval_every_steps=0", "model.moe.expert_backend=grouped_mm"),
        ],
        max_restarts=0,
        stall_s=180.0,
    )
    plain = run_plain(with_steps(command, STALL_STEPS), bench.folder, bench.say)
    records = list(read_records(plain.watched.run_dir / FILE_NAME))
    return [stall_row(records)]


def stall_row(records: Sequence[Mapping[str, Any]]) -> Row:
    """Of the saves among a run's records, but the last, after which there is no step. Pure."""
    saves = [record for record in records if record["kind"] == "checkpoint"][:-1]
    step_ms = statistics.median(r["step_ms"] for r in records if r["kind"] == "train")
    stalls_ms = [save["checkpoint_ms"] for save in saves]
    return {
        "saves": len(saves),
        "checkpoint_bytes": max(save["bytes"] for save in saves),
        "save_ms": statistics.median(save["save_ms"] for save in saves),
        "stall_ms": statistics.median(stalls_ms),
        "stall_max_ms": max(stalls_ms),
        "step_ms": step_ms,
        "stall_steps": statistics.median(stalls_ms) / step_ms,
    }


def start_up(bench: Bench) -> list[Row]:
    """From the command line to the end of the first step."""

    def overrides(ranks: int) -> list[str]:
        return bench.overrides(f"parallel.ep={min(ranks, 2)}")

    repeats = 3 if bench.seeds >= SEEDS else 1
    starts = measure_starts(WORLDS, overrides, bench.folder, repeats, bench.say)
    return [{**row, "ranks": int(row["ranks"])} for row in starts]


def goodput(bench: Bench) -> list[Row]:
    """Of a job with one fault in every stretch of 20 restart times, at a step of the stretch by chance.

    What a restart and a step take is found out first, with three faults of these kinds.
    """
    key = f"checkpoint.every_steps={GOODPUT_EVERY_STEPS}"
    few = [
        replace(spread(0, kind, 1, world_size=RANKS, every_steps=1)[0], step=step)
        for kind, step in zip(GOODPUT_KINDS, (110, 210, 310), strict=True)
    ]
    probed = _job(bench, "probe", [key], few, 400)
    restart_s = statistics.median(o.back_s for o in probed.outcomes if o.back_s is not None)
    steps = [r for r in read_records(probed.run_dir / FILE_NAME) if r["kind"] == "train"]
    step_s = statistics.median(record["step_ms"] / 1e3 for record in steps)
    stretch = max(GOODPUT_EVERY_STEPS, round(RESTART_TIMES_BETWEEN_FAULTS * restart_s / step_s))
    drawn = one_in_each(bench.seeds, max(1, bench.seeds // 5), stretch)
    bench.say(
        f"goodput: a restart takes {restart_s:.1f} s, a step {step_s * 1e3:.1f} ms: a fault every {stretch} "
        f"steps, {len(drawn)} in all, about {duration(len(drawn) * stretch * step_s)} and restarts"
    )
    watched = _job(bench, "faults", [key], drawn, len(drawn) * stretch)
    happened = [o for o in watched.outcomes if o.happened]
    back_s = statistics.median(o.back_s for o in happened if o.back_s is not None)
    return [
        {
            "faults": len(happened),
            "faults_survived": sum(o.survived for o in happened),
            "restart_s": back_s,
            "mean_s_between_faults": watched.wall_s / len(happened),
            "restart_times_between_faults": watched.wall_s / len(happened) / back_s,
            "steps_lost": sum(o.steps_lost for o in happened),
            "wall_s": watched.wall_s,
            "leaked": watched.leaks.total,
            "goodput_pct": watched.goodput_pct,
        }
    ]


def one_in_each(seed: int, count: int, stretch: int) -> tuple[Fault, ...]:
    """A fault in each of `count` stretches of so many steps: kind, rank, phase and step by chance. Pure.

    None comes before there are checkpoints, or so late that the job ends with it.
    """
    rng = random.Random(f"goodput {seed}")
    margin = stretch // 10
    return tuple(
        Fault(
            kind=rng.choice(GOODPUT_KINDS),
            rank=rng.randrange(RANKS),
            step=number * stretch + rng.randint(margin + 1, stretch - margin),
            phase=rng.choice(PHASES),
        )
        for number in range(count)
    )


def _job(
    bench: Bench, name: str, keys: Sequence[str], faults: Sequence[Fault], steps: int
) -> Watched:
    command = with_steps(bench.command(*keys, max_restarts=2 * len(faults)), steps)
    return run_job(command, bench.folder / name, faults)


def requeues(bench: Bench) -> list[Row]:
    """On a Slurm of our own."""
    if reason := missing():
        return [_left_out(bench, "requeues", reason)]
    overrides = bench.overrides("parallel.ep=2", "train.eval_every_steps=0")
    count = REQUEUES if bench.seeds >= SEEDS else 1
    return [{**requeue_five_times(overrides, bench.folder, bench.say, count)}]


def _left_out(bench: Bench, part: str, reason: str) -> Row:
    bench.say(f"{part}: left out: {reason}")
    return {"left_out": part, "why": reason}


def mutations(bench: Bench) -> list[Row]:
    """Each must be refused before a process group, with its key, the rule and a fix; what was not is named."""
    accepted, wall_s = [], []
    with Scene(bench.folder / "scene") as scene:
        tried = scene.mutations()[: QUICK_MUTATIONS if bench.quick else len(MUTATIONS)]
        for number, mutation in enumerate(tried, 1):
            refusal = scene.attempt(mutation)
            wall_s.append(refusal.wall_s)
            if problems := faults(mutation, refusal):
                accepted.append(mutation.name)
                bench.say(f"mutations: {mutation.name}: {'; '.join(problems)}")
            if number % 20 == 0:
                bench.say(f"mutations: [{number}/{len(tried)}]")
    return [
        {
            "mutations": len(tried),
            "mutations_refused": len(tried) - len(accepted),
            "refused_after_s": statistics.median(wall_s),
            "refused_after_max_s": max(wall_s),
            "not_refused": "; ".join(accepted),
        }
    ]


def expected_s(part: str, seeds: int) -> float:
    """About how long a part takes on a quiet machine of two cores: for the time that is left."""
    each_s = {"stop": 28.0, "partition": 12.0, "slow": 2.0, "disk_full": 8.0, "read_only": 8.0}
    whole_s = {
        "save_stall": 40.0,
        "start_up": 50.0 * (3 if seeds >= SEEDS else 1),
        "goodput": 40.0 + 125.0 * max(1, seeds // 5),
        "requeues": 60.0 + 20.0 * (REQUEUES if seeds >= SEEDS else 1),
        "mutations": 1.5 * len(MUTATIONS),
    }
    return whole_s[part] if part in whole_s else 15.0 + seeds * each_s.get(part, 8.0)


class Clock:
    """How long the parts that are left may take, by the pace of those that are done."""

    def __init__(self, seeds: int, parts: Sequence[str]) -> None:
        self._left_s = {part: expected_s(part, seeds) for part in parts}
        self._expected_s = self._took_s = 0.0

    def add(self, part: str, took_s: float) -> None:
        self._expected_s += self._left_s.pop(part)
        self._took_s += took_s

    def skip(self, part: str) -> None:
        del self._left_s[part]

    def left(self) -> str:
        pace = self._took_s / self._expected_s if self._expected_s else 1.0
        return f"{len(self._left_s)} parts and about {duration(pace * sum(self._left_s.values()))} left"
