"""`moesys launch`: check a run for the nodes it is to have, then queue it on a cluster."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesys.cli.configuration import add_config_dir, import_from_working_folder

if TYPE_CHECKING:
    from moesys.config.schema import RunConfig
    from moesys.launch.sbatch import Component, Job


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "launch",
        help="queue a training run on a Slurm cluster",
        description="Check the configuration for the nodes it is to have, and its memory, copy the code and the "
        "resolved configuration into the run folder, write a batch script and submit it.",
        epilog="example: moesys launch cluster=h100_pyxis nodes=16 experiment=quickstart "
        "--sweep optim.lr=1e-3,3e-3",
        allow_abbrev=False,
    )
    add_config_dir(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check, print the plan and the batch script, and stop",
    )
    parser.add_argument(
        "--sweep",
        metavar="KEY=VALUES",
        nargs="+",
        default=[],
        help="one run for each combination of key=value,value",
    )
    parser.add_argument(
        "overrides",
        metavar="WORD",
        nargs="*",
        help="cluster=NAME, nodes=N, cluster.key=value; all others as for moesys train",
    )


@dataclass(frozen=True, kw_only=True)
class _Words:
    """The words of the command line by whom they are for."""

    clusters: tuple[str, ...]
    nodes: tuple[int, ...]
    changes: tuple[str, ...]
    overrides: tuple[str, ...]
    sweep: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Point:
    """One run."""

    name: str
    """What all runs of a sweep have in common."""
    config: "RunConfig"
    warnings: tuple[str, ...]
    memory_gib: float | None
    """Of the fullest rank, by formula; None = the cluster's GPUs are not known."""
    found_copies: int | None
    """What memory has made of placement.copies=null; None = it was given."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir).absolute()


def run(args: argparse.Namespace) -> int:
    import_from_working_folder()
    from moesys.config.errors import ConfigError
    from moesys.launch import slurm
    from moesys.launch.sbatch import batch_script

    words = _words(args.overrides, args.sweep)
    components = _components(words, args.config_dir)
    points = _points(words, args.config_dir, components)
    job = _job(points, words)
    script = batch_script(components, job)
    for text in _plan(components, points):
        print(text)
    if args.dry_run:
        print(script, end="")
        return 0
    if not slurm.has("sbatch"):
        raise ValueError(
            "sbatch is not on this machine: launch from a login node of the cluster, or train here with "
            "moesys train"
        )
    for component in components:
        problem = slurm.find_partition_problem(component.cluster.partition, component.nodes)
        if problem is not None:
            raise ConfigError([problem])
    _refuse_active(points)
    try:
        return _submit(script, points, job)
    except slurm.SlurmError as error:
        raise ValueError(f"{error}") from error


def _words(given: Sequence[str], swept: Sequence[str]) -> _Words:
    """Words after --sweep are its own, but for those that are never of a run."""
    named = {"cluster": "", "nodes": "1"}
    changes, overrides, sweep = [], [], []
    for words, others in ((given, overrides), (swept, sweep)):
        for word in words:
            key, equals, value = word.partition("=")
            if equals and key in named:
                named[key] = value
            elif key.startswith("cluster."):
                changes.append(word)
            else:
                others.append(word)
    if not named["cluster"]:
        raise ValueError(
            "cluster= is missing: name a file of configs/cluster, or cluster/NAME.yaml in the folder of "
            "--config-dir, e.g. cluster=local"
        )
    clusters, nodes = named["cluster"].split("+"), named["nodes"].split("+")
    if len(nodes) != len(clusters) or not all(n.isdecimal() and int(n) for n in nodes):
        raise ValueError(
            f"nodes={named['nodes']} must be a number of nodes, at least 1, for each of cluster="
            f"{named['cluster']}: write nodes=16, or cluster=a+b nodes=1+16"
        )
    return _Words(
        clusters=tuple(clusters),
        nodes=tuple(map(int, nodes)),
        changes=tuple(changes),
        overrides=tuple(overrides),
        sweep=tuple(sweep),
    )


def _components(words: _Words, config_dir: Path | None) -> list["Component"]:
    from moesys.config.compose import search_path
    from moesys.launch.cluster import read_cluster
    from moesys.launch.sbatch import Component

    folders = search_path(config_dir)
    return [
        Component(cluster=read_cluster(name, words.changes, folders), nodes=nodes)
        for name, nodes in zip(words.clusters, words.nodes, strict=True)
    ]


def _points(
    words: _Words, config_dir: Path | None, components: Sequence["Component"]
) -> list[_Point]:
    """Each run, composed and checked for its ranks. ValueError naming the first combination that is wrong."""
    from moesys.config.compose import compose, sweep_points
    from moesys.config.validate import check

    places = {component.cluster.ranks_per_node for component in components}
    ranks_per_node = places.pop() if len(places) == 1 else None
    ranks = sum(component.nodes * component.cluster.ranks_per_node for component in components)
    combinations = sweep_points(words.sweep)
    name = compose(words.overrides, config_dir).run.name
    points = []
    for number, combination in enumerate(combinations):
        overrides = [*words.overrides, *combination]
        if words.sweep and not any(w.startswith(("run.name=", "run.dir=")) for w in combination):
            width = len(str(len(combinations) - 1))
            overrides.append(f"run.name='{name}-{number:0{width}d}'")
        try:
            composed = compose(overrides, config_dir)
            config, memory_gib = _with_memory(composed, components, ranks)
            warnings = check(config, ranks, ranks_per_node)
            _check_router(config)
        except ValueError as error:
            if not words.sweep:
                raise
            raise ValueError(f"{' '.join(combination)}: {error}") from error
        points.append(
            _Point(
                name=name,
                config=config,
                warnings=tuple(warnings),
                memory_gib=memory_gib,
                found_copies=None if config is composed else config.placement.copies,
            )
        )
    _refuse_same_folder(points)
    return points


def _check_router(config: "RunConfig") -> None:
    """With torch, which is not loaded for what is refused before."""
    from moesys.moe.contract import check_run_config

    check_run_config(config)


def _with_memory(
    config: "RunConfig", components: Sequence["Component"], ranks: int
) -> tuple["RunConfig", float | None]:
    """The configuration with what memory decides, and what the fullest rank will need; None for a layout that is wrong, or GPUs
    that are not known. Without torch, whose import takes longer than all else.

    Raises ConfigError if the smallest GPU has less, with what would help, and with what is wrong with files.
    """
    from moesys.config.copies import with_copies
    from moesys.config.errors import ConfigError
    from moesys.config.files import find_file_problems
    from moesys.config.memory import GIB, memory_problems, plan_memory
    from moesys.config.validate import validate
    from moesys.parallel.dims import parallel_dims

    sizes = [c.cluster.gpu_memory_gib for c in components if c.cluster.gpu_memory_gib is not None]
    try:
        validate(config, world_size=ranks)
    except ConfigError:
        return config, None  # `check` says it, with all else
    dims = parallel_dims(config.parallel, ranks)
    config = with_copies(config, dims, min(sizes, default=None))
    if not sizes:
        return config, None
    if problems := memory_problems(config, dims, min(sizes)):
        raise ConfigError([*problems, *find_file_problems(config)])
    return config, max(stage.total for stage in plan_memory(config, dims)) / GIB


def _refuse_same_folder(points: Sequence[_Point]) -> None:
    folders = [point.folder for point in points]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(
                f"run.dir={folder} is the folder of {folders.count(folder)} runs of the sweep, which must each "
                "have one of their own: use ${run.name} in run.dir"
            )


def _job(points: Sequence[_Point], words: _Words) -> "Job":
    from moesys.launch.sbatch import Job
    from moesys.launch.snapshot import has_source

    first = points[0]
    folder = first.folder
    if words.sweep:
        folder = folder.with_name(f"{first.name}.sweep")
    code = folder / "code"
    return Job(
        name=first.name,
        folder=folder,
        code=code,
        working_folder=Path.cwd(),
        python=sys.executable,
        python_path=(*([code] if has_source() else []), Path.cwd()),
        data=tuple(Path(path).absolute() for path in first.config.data.folders.values()),
        sweep_runs=len(points) if words.sweep else None,
    )


def _plan(components: Sequence["Component"], points: Sequence[_Point]) -> list[str]:
    """What is to be queued, in lines of a shell's comments."""
    ranks = sum(component.nodes * component.cluster.ranks_per_node for component in components)
    nodes = " and ".join(
        f"{c.nodes} node{'s' * (c.nodes > 1)} of {c.cluster.name}" for c in components
    )
    lines = [f"# {len(points)} run{'s' * (len(points) > 1)} of {ranks} ranks on {nodes}"]
    lines += [f"# run folder: {point.folder}" for point in points]
    needs = [point.memory_gib for point in points if point.memory_gib is not None]
    if needs:
        lines.append(f"# memory of the fullest rank, by formula: {max(needs):.1f} GiB")
    if found := sorted({p.found_copies for p in points if p.found_copies is not None}):
        lines.append(f"# placement.copies, as many as fit: {', '.join(map(str, found))}")
    warnings = dict.fromkeys(warning for point in points for warning in point.warnings)
    return lines + [f"# warning: {warning}" for warning in warnings]


def _refuse_active(points: Sequence[_Point]) -> None:
    from moesys.launch.runs import can_start, update_statuses
    from moesys.launch.status import read_status

    update_statuses([point.folder for point in points])
    for point in points:
        status = read_status(point.folder)
        if status is not None and not can_start(status):
            raise ValueError(
                f"run.dir={point.folder} is {status.state} as job {status.job_id}: wait for it, moesys runs "
                "cancel it, or choose another run.name"
            )


def _submit(script: str, points: Sequence[_Point], job: "Job") -> int:
    from moesys.launch.runs import Submission, submit
    from moesys.launch.snapshot import take_snapshot, write_config

    job.folder.mkdir(parents=True, exist_ok=True)
    take_snapshot(job.folder)
    for point in points:
        write_config(point.folder, point.config)
    folders = tuple(point.folder for point in points)
    is_sweep = job.sweep_runs is not None
    if is_sweep:
        _write(job.folder / "runs.txt", "".join(f"{folder}\n" for folder in folders))
    _write(job.folder / "job.sbatch", script)
    tasks = tuple(range(len(points))) if is_sweep else None
    job_id = submit(Submission(script=job.folder / "job.sbatch", runs=folders, tasks=tasks))
    print(f"job {job_id}")
    for folder in folders:
        print(f"follow it: moesys runs tail {shlex.quote(str(folder))}")
    return 0


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
