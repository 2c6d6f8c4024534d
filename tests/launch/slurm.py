"""A real Slurm on this machine: munged, slurmctld and one slurmd per virtual node, ours alone.

    with slurm_cluster(nodes=2) as slurm:
        job_id = slurm.submit("--nodes=2", "script.sbatch")
        slurm.wait(job_id, "COMPLETED", timeout_s=60)

Every file lies in a temporary folder and every port is free when it starts, so a Slurm that the machine
has besides is left alone. One such cluster runs at a time; a second waits for its lock. The nodes are all
this machine: they share its files, and claim more cores and memory than it has.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CPUS_PER_NODE = 4
MEMORY_MIB_PER_NODE = 16384
# A cluster's daemons need some seconds on a busy machine, and another cluster may run for minutes.
START_S, LOCK_S = 90.0, 1800.0
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


def missing() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    if os.geteuid() != 0:
        return "a Slurm of several virtual nodes is started by root"
    absent = [name for name in PROGRAMS if _which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    return None


@dataclass(frozen=True, kw_only=True)
class SlurmCluster:
    """A running cluster. `environment` makes every Slurm command talk to it; without it they find no cluster."""

    folder: Path
    nodes: tuple[str, ...]
    partition: str
    environment: Mapping[str, str] = field(repr=False)

    def run(
        self,
        *command: str | Path,
        timeout_s: float = 60.0,
        check: bool = True,
        cwd: Path | None = None,
    ) -> str:
        """What a command prints, e.g. run("squeue"). AssertionError with its errors unless it ends with 0."""
        done = subprocess.run(
            list(map(str, command)),
            env=dict(self.environment),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path | None = None) -> int:
        """sbatch with these words; the id of the job."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd).partition(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, Restarts, ExitCode, NodeList, ..."""
        lines = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).splitlines()
        words = [word.partition("=") for word in lines[0].split()]
        return {name: value for name, equals, value in words if equals}

    def wait(self, job_id: int, *states: str, timeout_s: float = 120.0) -> dict[str, str]:
        """The job, once it is in one of these states. AssertionError with the last state if that is too late."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job_id} is not {states} in time: {job}"
            time.sleep(0.2)
        return job


@contextmanager
def slurm_cluster(nodes: int = 2) -> Iterator[SlurmCluster]:
    """Start a cluster of `nodes` virtual nodes n1, n2, ... and, however the block ends, end it and its jobs."""
    with ExitStack() as stack:
        stack.enter_context(_only_one())
        folder = Path(tempfile.mkdtemp(prefix="moesys-slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        conf = folder / "slurm.conf"
        names = tuple(f"n{number}" for number in range(1, nodes + 1))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        environment["SLURM_CONF"] = str(conf)
        cluster = SlurmCluster(folder=folder, nodes=names, partition="p", environment=environment)
        _write_conf(cluster)
        stack.callback(_kill_all_of, conf)
        munged = folder / "munged.log"
        _start(cluster, "munged", "--foreground", "--force", *_munge_files(cluster), log=munged)
        _start(cluster, "slurmctld", "-D", log=folder / "slurmctld.log")
        for name in names:
            _start(cluster, "slurmd", "-D", "-N", name, log=folder / f"slurmd-{name}.log")
        _wait_for_nodes(cluster)
        yield cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Four virtual nodes for the tests of a module, or a skip that says why there are none."""
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster(nodes=4) as cluster:
        yield cluster


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextmanager
def _only_one() -> Iterator[None]:
    path = Path(tempfile.gettempdir(), "moesys-slurm.lock")
    deadline = time.monotonic() + LOCK_S
    with path.open("a", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, f"{path}: another cluster holds it"
                time.sleep(0.2)
        yield


def _write_conf(cluster: SlurmCluster) -> None:
    host, folder = socket.gethostname(), cluster.folder
    control, *ports = _free_ports(len(cluster.nodes) + 1)
    subprocess.run(
        [str(_which("mungekey")), "--create", f"--keyfile={folder / 'munge.key'}"], check=True
    )
    (folder / "state").mkdir()
    lines = [
        "ClusterName=virtual",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={control}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # Jobs of two clusters, one after the other or of two users, have ports of their own.
        f"FirstJobId={1 + control % 1000}",
        # A requeued job waits until its credential is out of date, 120 s otherwise.
        f"AuthInfo=socket={folder / 'munge.socket'},cred_expire=5",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdSpoolDir={folder / 'spool-%n'}",
        f"SlurmdPidFile={folder / 'slurmd-%n.pid'}",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        f"DefMemPerCPU={MEMORY_MIB_PER_NODE // CPUS_PER_NODE}",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "AccountingStorageType=accounting_storage/none",
        # A step that has more memory than its job asked for is killed: without cgroups, by looking every 2 s.
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherParams=OverMemoryKill",
        "JobAcctGatherFrequency=task=2",
        "SlurmdParameters=config_overrides",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
        "MessageTimeout=60",
        "SlurmdTimeout=300",
        "KillWait=10",
        "MinJobAge=3600",
        "OverTimeLimit=0",
    ]
    lines += [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} "
        f"RealMemory={MEMORY_MIB_PER_NODE} State=UNKNOWN"
        for name, port in zip(cluster.nodes, ports, strict=True)
    ]
    lines.append(
        f"PartitionName={cluster.partition} Nodes={','.join(cluster.nodes)} Default=YES "
        "MaxTime=INFINITE State=UP OverSubscribe=NO"
    )
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _munge_files(cluster: SlurmCluster) -> list[str]:
    folder = cluster.folder
    return [
        f"--socket={folder / 'munge.socket'}",
        f"--key-file={folder / 'munge.key'}",
        f"--log-file={folder / 'munged.log'}",
        f"--pid-file={folder / 'munged.pid'}",
        f"--seed-file={folder / 'munged.seed'}",
    ]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(cluster: SlurmCluster, name: str, *words: str, log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        subprocess.Popen(
            [str(_which(name)), *words],
            env=dict(cluster.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cluster.folder,
        )


def _wait_for_nodes(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + START_S
    while True:
        states = cluster.run("sinfo", "--noheader", "--Node", "--format=%t", check=False).split()
        if states == ["idle"] * len(cluster.nodes):
            return
        if time.monotonic() > deadline:
            logs = [
                f"{path.name}:\n{path.read_text()[-1500:]}" for path in cluster.folder.glob("*.log")
            ]
            raise AssertionError(f"the cluster did not start: {states}\n" + "\n".join(logs))
        time.sleep(0.1)


def _kill_all_of(conf: Path) -> None:
    """End the daemons, the steps and whatever jobs have started: all that has our SLURM_CONF, and only that."""
    deadline = time.monotonic() + 30
    while victims := list(_processes_of(conf)):
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        assert time.monotonic() < deadline, f"still there: {victims}"
        time.sleep(0.05)


def _processes_of(conf: Path) -> Iterator[int]:
    """Of a process that has ended and waits for its parent, the environment is empty."""
    wanted = f"SLURM_CONF={conf}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in variables and int(folder.name) != os.getpid():
            yield int(folder.name)
