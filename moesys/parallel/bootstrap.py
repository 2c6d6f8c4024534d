"""Start and end of a process's part in a run: the only process-wide state.

Where the process stands comes from its launcher (`launcher`); the ranks meet in the job's store and compare
what they are (`meeting`); only then is the backend's process group made.
"""

import gc
import itertools
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

import moesys
from moesys.parallel.environment import environment_problems
from moesys.parallel.interfaces import choose_interface, interfaces_here, own_address, running_here
from moesys.parallel.job_store import open_store
from moesys.parallel.launcher import Launcher, Place
from moesys.parallel.meeting import Meeting, meet
from moesys.parallel.roll_call import Expected, Facts, Verdict
from moesys.parallel.store_address import spell_address
from moesys.parallel.surroundings import place_here

START_TIMEOUT_S = 300.0
INTERFACE_VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    launcher: Launcher = "single"
    nodes: tuple[str, ...] = ("localhost",)
    """The name of each rank's node."""
    rank_order: str = "as started"
    """Or "by topology" or "as measured", if that puts ranks of a node, or nodes of a switch, together."""

    @property
    def node(self) -> str:
        return self.nodes[self.rank]

    @property
    def ranks_per_node(self) -> int | None:
        """None where nodes have different numbers of ranks, or these are not neighbours."""
        counts = [len(list(ranks)) for _, ranks in itertools.groupby(self.nodes)]
        is_even = len(set(counts)) == 1 and len(counts) == len(set(self.nodes))
        return counts[0] if is_even else None


@contextmanager
def process_group(
    device: str,
    timeout_s: float,
    start_timeout_s: float = START_TIMEOUT_S,
    place: Place | None = None,
    settings: str = "",
    measured: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """Join the run (NCCL on GPUs, gloo on CPUs), leave it at the end. `device`: auto, cpu or cuda.

    Collective. The ranks have `start_timeout_s` to meet, and must have the same `settings`; after that a
    collective has `timeout_s`. `place` is this process's own unless given. `measured`: each node's address by
    which ranks are put in order, in place of what the launcher tells. Rank 0 prints warnings.

    Raises:
        ValueError: the launcher's variables are wrong; a rank is missing or differs; the store is out of reach.
    """
    place = place or place_here(os.environ)
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    backend = "nccl" if use_cuda else "gloo"
    problem = "; ".join(problems_here(device, use_cuda, place.local_rank))
    own_device = torch.device("cuda", place.local_rank) if use_cuda else torch.device("cpu")
    if place.world_size == 1:
        if problem:
            raise ValueError(problem)
        process, store = _alone(place, own_device, backend), dist.HashStore()
        variables: dict[str, str] = {}
    else:
        base = open_store(place, start_timeout_s)
        mine = _facts(place, own_device, backend, problem)
        expected = Expected(
            world_size=place.world_size,
            nodes=place.nodes,
            ranks_per_node=place.ranks_per_node,
            within_s=start_timeout_s,
            measured=measured or {},
        )
        meeting = meet(dist.PrefixStore(f"moesys {place.job}", base), mine, settings, expected)
        base.set_timeout(timedelta(seconds=timeout_s))
        process, store = _joined(place, own_device, backend, meeting), meeting.store
        variables = _variables(place, mine, backend, meeting)
        if process.rank == 0:
            _tell(process, place, variables, meeting)
    if use_cuda:
        torch.cuda.set_device(own_device)
    with _set(variables):
        dist.init_process_group(
            backend,
            store=store,
            rank=process.rank,
            world_size=process.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=own_device if use_cuda else None,
        )
        try:
            yield process
            # A rank that leaves while another still talks to it can bring both down.
            dist.barrier()
        finally:
            gc.collect()  # groups that only cycles still hold must not outlive the interpreter
            dist.destroy_process_group()


def problems_here(device: str, use_cuda: bool, local_rank: int) -> list[str]:
    """What this process would be refused for, whatever the others are."""
    found = environment_problems(os.environ, list(interfaces_here()), with_nccl=use_cuda)
    if use_cuda and local_rank >= (count := torch.cuda.device_count()):
        fewer = f"start at most {count} ranks per node, or " if count else ""
        found.append(
            f"train.device={device} needs a GPU for LOCAL_RANK={local_rank}, and this node shows {count}: "
            f"{fewer}set train.device=cpu, or look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        )
    return found


def _alone(place: Place, device: torch.device, backend: str) -> Process:
    return Process(
        rank=0,
        world_size=1,
        local_rank=place.local_rank,
        device=device,
        backend=backend,
        launcher=place.launcher,
        nodes=(place.node,),
    )


def _joined(place: Place, device: torch.device, backend: str, meeting: Meeting) -> Process:
    verdict = meeting.verdict
    return Process(
        rank=verdict.new_ranks[place.rank],
        world_size=place.world_size,
        local_rank=place.local_rank,
        device=device,
        backend=backend,
        launcher=place.launcher,
        nodes=tuple(verdict.nodes),
        rank_order=_rank_order(verdict),
    )


def _rank_order(verdict: Verdict) -> str:
    if not verdict.is_reordered:
        return "as started"
    return "as measured" if verdict.is_measured else "by topology"


def _facts(place: Place, device: torch.device, backend: str, problem: str) -> Facts:
    assert place.store_host is not None
    address = own_address(place.store_host)
    chosen = os.environ.get(INTERFACE_VARIABLES[backend])
    if chosen is None and address is not None:
        chosen = choose_interface(interfaces_here(), running_here(), address)
    has_device = device.type == "cuda" and not problem
    return Facts(
        rank=place.rank,
        node=place.node,
        python=platform.python_version(),
        torch=torch.__version__,
        moesys=moesys.__version__,
        device=torch.cuda.get_device_name(device) if has_device else device.type,
        address=address,
        interface=chosen,
        topology=place.topology,
        problem=problem,
    )


def _variables(place: Place, mine: Facts, backend: str, meeting: Meeting) -> dict[str, str]:
    """What other code of this process, and the backend, read from the environment while the group lives."""
    found = {"MASTER_ADDR": str(place.store_host), "MASTER_PORT": str(place.store_port)}
    name = INTERFACE_VARIABLES[backend]
    if meeting.verdict.has_several_machines and mine.interface and name not in os.environ:
        found[name] = mine.interface
    return found


def _tell(process: Process, place: Place, variables: Mapping[str, str], meeting: Meeting) -> None:
    for warning in meeting.verdict.warnings:
        print(f"warning: {warning}", flush=True)
    name = INTERFACE_VARIABLES[process.backend]
    if name in variables:
        where = spell_address(str(place.store_host), int(place.store_port or 0))
        print(f"{name}={variables[name]}: the way to the job's store at {where}", flush=True)
    elif meeting.verdict.has_several_machines and name not in os.environ:
        print(
            f"warning: {process.node} has no one interface towards the other machines: set {name}",
            flush=True,
        )


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
