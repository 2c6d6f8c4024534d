"""Facts of a cluster, from configs/cluster/NAME.yaml or a file of the user's: what a batch script needs to know.

    cluster=h100_pyxis cluster.partition=debug

They are no part of a run's configuration or its hash: a run is the same wherever it is made.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from moesys.config.bounds import in_range
from moesys.config.build import build, unknown_key
from moesys.config.errors import ConfigError, Problem, did_you_mean

GROUP = "cluster"


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """Where the ranks run: on the node itself, or in a container that srun starts for each."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis = srun --container-image (enroot); apptainer = apptainer exec."""
    image: str | None = None
    """A .sqsh or .sif file, or an address that the runtime understands."""
    mounts: tuple[str, ...] = ()
    """FROM:TO[:OPTIONS]. The working folder, the run folder and the data folder are mounted besides, as they are."""
    python: str = "python3"
    """The interpreter inside, with moesys and what it needs."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What sbatch, srun and NCCL are told. A null is not said at all: the cluster's default holds."""

    name: str
    """Of the cluster, for people."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    qos: str | None = None
    """sbatch --qos."""
    time_limit: str | None = None
    """sbatch --time: minutes, HH:MM:SS or D-HH:MM:SS. A run goes on after it, if it is longer."""
    gpus_per_node: int = 0
    """sbatch --gpus-per-node; 0 = ranks on CPUs."""
    ranks_per_node: int = 1
    """Tasks per node, one rank each; at most gpus_per_node where there are GPUs."""
    cpus_per_task: int = 1
    """CPUs of a rank, and its threads (OMP_NUM_THREADS)."""
    memory_gib_per_node: int | None = None
    """sbatch --mem in GiB; 0 = all that the node has."""
    gpu_memory_gib: float | None = None
    """Memory of a GPU in GiB; a run that needs more is refused before it is queued. null = not checked."""
    network_interface: str | None = None
    """Between nodes, for gloo and for NCCL's start: its name, as in `ip link`."""
    rails: tuple[str, ...] = ()
    """InfiniBand or RoCE devices that carry NCCL's data, in order of the GPUs: mlx5_0, ..."""
    modules: tuple[str, ...] = ()
    """module load, in this order."""
    setup: tuple[str, ...] = ()
    """Lines of bash, run on the first node after the modules and before the ranks."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of every rank, stronger than launch/env/nccl.env."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, one each: --constraint=h100."""
    grace_s: int = 120
    """Seconds before the time limit at which a run saves and asks to be requeued; a save must fit in."""
    restarts: int = 3
    """How often the ranks are started again in place after one was lost, without a new checkpoint in between."""
    preflight: bool = False
    """Whether `moesys doctor --cluster --quick` looks at the nodes before each start, and bad ones are left out."""
    container: ContainerConfig = field(default_factory=ContainerConfig)


@dataclass(frozen=True, kw_only=True)
class _Root:
    """So that every problem names its key in full."""

    cluster: ClusterConfig


def read_cluster(name: str, changes: Sequence[str], folders: Sequence[Path]) -> ClusterConfig:
    """The cluster `name` of configs/cluster or of the user's folder, with changes as cluster.key=value.

    Args:
        folders: that hold a folder `cluster`, the last one first.

    Raises:
        ConfigError: no such cluster, or every wrong key, type and value.
    """
    paths = {path.stem: path for root in folders for path in sorted((root / GROUP).glob("*.yaml"))}
    if name not in paths:
        raise ConfigError(
            [
                Problem(
                    key=GROUP,
                    given=name,
                    rule=f"must be one of {', '.join(sorted(paths))}",
                    fix=f"{did_you_mean(name, paths)} Or write {GROUP}/{name}.yaml in a folder of yours and name "
                    "that with --config-dir",
                )
            ]
        )
    try:
        data = yaml.safe_load(paths[name].read_bytes()) or {}
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ValueError(
            f"{paths[name]} is not readable as YAML ({where}): correct the file"
        ) from error
    problems = [problem for change in changes for problem in _apply(change, data)]
    try:
        cluster = build(_Root, {GROUP: data}).cluster
    except ConfigError as error:
        problems += error.problems
    else:
        problems += _find_problems(cluster)
        if not problems:
            return cluster
    raise ConfigError(problems)


def _apply(change: str, data: dict[str, Any]) -> Iterator[Problem]:
    """Put cluster.a.b=value into the nested dict, its value read as YAML."""
    key, equals, text = change.partition("=")
    path = key.split(".")[1:]
    if not equals or not path:
        yield Problem(key=change, rule="must be cluster.KEY=VALUE", fix="write cluster.partition=p")
        return
    if problem := unknown_key(key, _Root, text):
        yield problem
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        yield Problem(key=key, given=text, rule="must be a value in YAML", fix="quote it")
        return
    for name in path[:-1]:
        data = data.setdefault(name, {})
    data[path[-1]] = value


_TIME_LIMIT = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@/+-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOUNT = re.compile(r"[^:,\s]+:/[^:,\s]*(:[^:,\s]+)?")
_OPTION = re.compile(r"--(?P<name>[a-z][a-z-]*)(=.+)?")
_OURS = {
    "nodes": "nodes=N",
    "ntasks-per-node": "cluster.ranks_per_node",
    "ntasks": "nodes=N",
    "gpus-per-node": "cluster.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.memory_gib_per_node",
    "time": "cluster.time_limit",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "signal": "cluster.grace_s",
    "job-name": "run.name",
    "array": "--sweep",
    **dict.fromkeys(("output", "error", "open-mode", "requeue", "no-requeue", "chdir"), "nothing"),
}
"""Options that the batch script has already, and what decides them."""


def _find_problems(cluster: ClusterConfig) -> Iterator[Problem]:
    bounds = {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_task": 1, "restarts": 0}
    for key, least in bounds.items():
        yield from in_range(f"{GROUP}.{key}", getattr(cluster, key), least)
    # Slurm's own bound of --signal.
    yield from in_range(f"{GROUP}.grace_s", cluster.grace_s, 10, below=65536)
    if cluster.memory_gib_per_node is not None:
        yield from in_range(f"{GROUP}.memory_gib_per_node", cluster.memory_gib_per_node, 0)
    if cluster.gpu_memory_gib is not None:
        yield from in_range(f"{GROUP}.gpu_memory_gib", cluster.gpu_memory_gib, above=0.0)
        if not cluster.gpus_per_node:
            yield Problem(
                key=f"{GROUP}.gpu_memory_gib",
                given=cluster.gpu_memory_gib,
                rule=f"has no effect with {GROUP}.gpus_per_node=0",
                fix="set it to null",
            )
    if 0 < cluster.gpus_per_node < cluster.ranks_per_node:
        yield Problem(
            key=f"{GROUP}.ranks_per_node",
            given=cluster.ranks_per_node,
            rule=f"must be at most {GROUP}.gpus_per_node={cluster.gpus_per_node}: a rank has a GPU of its own",
            fix=f"use {cluster.gpus_per_node}",
        )
    if cluster.time_limit is not None and not _TIME_LIMIT.fullmatch(cluster.time_limit):
        yield Problem(
            key=f"{GROUP}.time_limit",
            given=cluster.time_limit,
            rule="must be a time of sbatch",
            fix='write "2-00:00:00" for two days, "04:00:00" for four hours, in quotes',
        )
    for key in ("partition", "account", "qos", "network_interface"):
        value = getattr(cluster, key)
        if value is not None:
            yield from _words(f"{GROUP}.{key}", re.compile(r"[^\s\"'\\]+"), [value], "p")
    yield from _words(f"{GROUP}.rails", _WORD, cluster.rails, "mlx5_0")
    yield from _words(f"{GROUP}.modules", _WORD, cluster.modules, "cuda/13.0")
    yield from _words(f"{GROUP}.container.mounts", _MOUNT, cluster.container.mounts, "/data:/data")
    yield from _words(f"{GROUP}.env", _VARIABLE, cluster.env, "NCCL_DEBUG")
    for line in (*cluster.setup, *cluster.env.values(), cluster.name, cluster.container.python):
        if not line or "\n" in line:
            yield Problem(
                key=f"{GROUP}.setup, env, name and container.python",
                given=line,
                rule="must be lines that are not empty",
                fix="give one line of bash to each entry",
            )
    yield from _sbatch(cluster)
    yield from _container(cluster.container)


def _words(
    key: str, allowed: re.Pattern[str], words: Sequence[str] | Mapping[str, str], example: str
) -> Iterator[Problem]:
    for word in words:
        if not allowed.fullmatch(word):
            rule = f"must be a word that matches {allowed.pattern}"
            yield Problem(key=key, given=word, rule=rule, fix=f"write it as in {example}")


def _sbatch(cluster: ClusterConfig) -> Iterator[Problem]:
    for option in cluster.sbatch:
        found = _OPTION.fullmatch(option)
        if found is None or "\n" in option:
            rule, fix = "must be a long option of sbatch", 'write "--constraint=h100", one an entry'
        elif found["name"] in _OURS:
            rule, fix = "is in the batch script already", f"{_OURS[found['name']]} decides it"
        else:
            continue
        yield Problem(key=f"{GROUP}.sbatch", given=option, rule=rule, fix=fix)


def _container(container: ContainerConfig) -> Iterator[Problem]:
    runtime, key = container.runtime, f"{GROUP}.container.image"
    if runtime != "none" and not container.image:
        yield Problem(
            key=key,
            rule=f"is required with {GROUP}.container.runtime={runtime}",
            fix="name the image file",
        )
    if runtime == "none" and container.image:
        yield Problem(
            key=key,
            given=container.image,
            rule=f"has no effect with {GROUP}.container.runtime=none",
            fix="set runtime to pyxis or apptainer, or image to null",
        )
