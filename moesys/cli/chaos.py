"""`moesys chaos`: run a training job, make faults happen in it, and measure what it does about them."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesys.cli.configuration import add_overrides

if TYPE_CHECKING:
    from moesys.chaos.faults import Fault
    from moesys.chaos.job import Command
    from moesys.config.schema import RunConfig

_OURS = ("run.dir", "train.steps", "train.log_every_steps")
"""Keys that each job sets for itself, by what was given."""
_NO_FAULTS_GIVEN = "say which faults: one of --faults, --mean-steps, --mean-s, --table"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "chaos",
        help="inject faults into a training job and measure how it copes",
        description="Train without a fault in RUN/plain, then with faults beside it, under torchrun with restarts in "
        "place. Measured from outside: when a rank noticed, when the next new step was done, steps done twice, "
        "whether every loss is bitwise the undisturbed one, and what is left behind. run.dir is the folder for all "
        "runs, and must be new. Exit code 1 if a fault was not survived. Linux.",
        epilog="example: moesys chaos --nproc 2 --faults 'kill rank=1 step=40 phase=exchange; stop rank=0 step=60' "
        "experiment=quickstart run.dir=runs/chaos",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--faults",
        metavar="TEXT",
        help="KIND rank=R step=S [phase=P] [seconds=N], separated by ';' or lines; @FILE reads a file",
    )
    which.add_argument(
        "--mean-steps",
        metavar="N",
        type=float,
        help="faults by chance, one every N steps on average",
    )
    which.add_argument(
        "--mean-s",
        metavar="S",
        type=float,
        help="faults by chance, one every S seconds of steps on average, for --minutes",
    )
    which.add_argument(
        "--table", action="store_true", help="each kind --seeds times, in a job of its own"
    )
    parser.add_argument("--nproc", metavar="N", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument(
        "--minutes", metavar="M", type=float, default=30.0, help="for --mean-s (default: 30)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is by chance")
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        default=20,
        help="faults a kind, for --table (default: 20)",
    )
    parser.add_argument(
        "--kinds", metavar="A,B", help="of the faults by chance and the table (default: all)"
    )
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        type=int,
        help="restarts in place that torchrun makes (default: 2 for each fault)",
    )
    parser.add_argument(
        "--stall-s",
        metavar="S",
        type=float,
        default=180.0,
        help="a job with nothing new for so long has not survived (default: 180)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the table there too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the faults and the command, and stop"
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    from moesys.chaos.campaign import headline, run_faulted, run_plain, with_steps
    from moesys.chaos.outcome import markdown
    from moesys.config.compose import compose
    from moesys.config.validate import check
    from moesys.train.folder import write_text

    if not sys.platform.startswith("linux"):
        raise ValueError(
            f"moesys chaos watches /proc, which {sys.platform} does not have: use Linux"
        )
    config = compose(args.overrides, args.config_dir)
    check(config, args.nproc, args.nproc)
    folder = Path(config.run.dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"run.dir={folder} is not empty: remove it, or choose a new one")
    jobs, steps = _jobs(args, config)
    num_faults = max((len(faults) for faults in jobs.values()), default=0)
    command = with_steps(_command(args, num_faults), steps)
    if args.dry_run:
        for name, faults in jobs.items():
            print(f"# {name}: {len(faults)} faults", *faults, sep="\n")
            print(f"# in {folder / name}: {shlex.join(command.words(folder / name, faults))}")
        return 0
    plain = run_plain(command, folder, _say)
    tried = [
        run_faulted(command, folder, name, faults, plain, _say) for name, faults in jobs.items()
    ]
    table = markdown([one.row() for one in tried])
    if args.output is not None:
        write_text(args.output, table)
    if args.json:
        found: dict[str, Any] = {
            "headline": headline(tried),
            "plain_wall_s": plain.watched.wall_s,
            "plain_step_s": plain.step_s,
            "jobs": [one.as_dict() for one in tried],
        }
        print(json.dumps(found))
    else:
        print(table, end="")
        for one in tried:
            print(*_rest(one), sep="\n")
    return 0 if all(one.survived_pct == 100 for one in tried) else 1


def _jobs(
    args: argparse.Namespace, config: "RunConfig"
) -> tuple[dict[str, tuple["Fault", ...]], int]:
    """The faults of each job by its name, and how many steps a job has."""
    from moesys.chaos.campaign import table_faults, table_steps
    from moesys.chaos.faults import KINDS, draw, parse_faults, phases_of, problems_in_run

    steps, phases = config.train.steps, phases_of(config)
    kinds = args.kinds.split(",") if args.kinds else list(KINDS)
    if args.faults is not None:
        jobs = {"faults": parse_faults(_text(args.faults))}
    elif args.table:
        every_steps = config.checkpoint.every_steps
        if not every_steps:
            raise ValueError("checkpoint.every_steps=0: --table needs checkpoints to go on from")
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds} must be at least 1")
        draw(0, kinds, world_size=args.nproc, steps=0, mean_steps_between=1, phases=phases)
        jobs = table_faults(
            kinds,
            args.seed,
            args.seeds,
            world_size=args.nproc,
            every_steps=every_steps,
            phases=phases,
        )
        return jobs, table_steps(jobs, every_steps)
    else:
        mean_steps = args.mean_steps
        if args.mean_s is not None:
            steps, mean_steps = _long_run(args)
        if mean_steps is None:
            raise ValueError(_NO_FAULTS_GIVEN)
        drawn = draw(
            args.seed,
            kinds,
            world_size=args.nproc,
            # The last fault has steps to come back in.
            steps=max(0, steps - 2 * config.checkpoint.every_steps - 1),
            mean_steps_between=mean_steps,
            phases=phases,
        )
        jobs = {"faults": drawn}
    if problems := problems_in_run(
        jobs["faults"], world_size=args.nproc, steps=steps, phases=phases
    ):
        raise ValueError("\n".join(["these faults cannot happen:", *problems]))
    return jobs, steps


def _text(given: str) -> str:
    """The faults that were given, or those in the file that was."""
    if given[:1] != "@":
        return given
    try:
        return Path(given[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--faults {given}: cannot be read ({error}); name a file with a fault on each line"
        ) from error


def _long_run(args: argparse.Namespace) -> tuple[int, float]:
    """Steps of `--minutes` without a fault, and steps in `--mean-s`, by the pace of a short job."""
    import tempfile

    from moesys.chaos.campaign import run_plain, with_steps

    if args.minutes <= 0 or args.mean_s <= 0:
        raise ValueError(f"--minutes {args.minutes:g} and --mean-s {args.mean_s:g} must be above 0")
    with tempfile.TemporaryDirectory() as folder:
        _say("how long a step takes")
        step_s = run_plain(with_steps(_command(args, 0), 20), Path(folder), _say).step_s
    return max(1, round(args.minutes * 60 / step_s)), max(1.0, args.mean_s / step_s)


def _command(args: argparse.Namespace, num_faults: int) -> "Command":
    from moesys.chaos.job import Command

    return Command(
        nproc=args.nproc,
        overrides=[word for word in args.overrides if word.partition("=")[0] not in _OURS],
        config_dir=args.config_dir,
        max_restarts=2 * num_faults if args.max_restarts is None else args.max_restarts,
        stall_s=args.stall_s,
    )


def _rest(tried: Any) -> list[str]:
    """What the table does not say of a job."""
    watched = tried.watched
    losses = "every loss is the undisturbed one, bit by bit"
    if tried.first_difference is not None:
        losses = f"losses differ from step {tried.first_difference} on"
    lines = [f"{tried.name}: {losses}; goodput {watched.goodput_pct:.1f} %; left: {watched.leaks}"]
    if watched.grown is not None:
        lines.append(
            f"{tried.name}: a process grew by at most {watched.grown.num_descriptors} descriptors and "
            f"{watched.grown.memory_bytes / 2**20:.0f} MiB"
        )
    return lines


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
