"""The job's key-value store: rank 0 or torchrun's agent serves it, the others find it, or are told why not."""

import errno
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from moesys.parallel.launcher import Place
from moesys.parallel.store_address import spell_address, taken, unresolved

OWN_HOST_S = 2.0
"""Rank 0 reaches its own listening socket at once, or MASTER_ADDR does not lead to it."""
_RETRY_S = 0.2
_ATTEMPT_S = 5.0


def open_store(place: Place, timeout_s: float) -> dist.TCPStore:
    """A connection to the store at `place`, which rank 0 makes unless torchrun's agent has.

    Raises:
        ValueError: the port is taken, the name is unknown, there is no way, nothing answers in time.
    """
    host, port = place.store_host, place.store_port
    assert host is not None, "a world of several ranks has a place for its store"
    assert port is not None, "a world of several ranks has a place for its store"
    if place.rank == 0 and not place.agent_has_store:
        store = _serve(port, timeout_s)
        _reach(place, min(timeout_s, OWN_HOST_S))
        return store
    _reach(place, timeout_s)
    try:
        return dist.TCPStore(
            host, port, is_master=False, timeout=timedelta(seconds=min(timeout_s, _ATTEMPT_S))
        )
    except dist.DistError as error:
        raise ValueError(
            f"{spell_address(host, port)} answers, but is no store of a training job: another program "
            f"has the port; set MASTER_PORT to a free one of that machine ({_first_line(error)})"
        ) from error


def _serve(port: int, timeout_s: float) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            "localhost",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except dist.DistError as error:
        is_taken = "EADDRINUSE" in str(error)
        raise ValueError(taken(port) if is_taken else taken(port, _first_line(error))) from error


def _reach(place: Place, timeout_s: float) -> None:
    """Wait until something listens there."""
    host, port = str(place.store_host), int(place.store_port or 0)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=_ATTEMPT_S):
                return
        except OSError as error:
            is_final = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
            is_final |= error.errno in (errno.ENETUNREACH, errno.EINVAL)
            if is_final or time.monotonic() + _RETRY_S > deadline:
                raise ValueError(_why_not(place, error, timeout_s)) from error
        time.sleep(_RETRY_S)


def _why_not(place: Place, error: OSError, timeout_s: float) -> str:
    host, port = str(place.store_host), int(place.store_port or 0)
    who = f"rank {place.rank} on {place.node}"
    where = spell_address(host, port)
    if isinstance(error, socket.gaierror):
        return unresolved(place, error)
    if place.rank == 0 and not place.agent_has_store:
        return (
            f"{who} serves the job's store, but does not reach itself at {where} ({error}): MASTER_ADDR "
            "must be a name or address of rank 0's machine"
        )
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL):
        return (
            f"{who} has no route to the job's store at {where} ({error}): set MASTER_ADDR to an address "
            "on a network that this machine is on"
        )
    if isinstance(error, ConnectionRefusedError):
        return (
            f"{who} found nobody at {where}, the job's store, within train.start_timeout_s={timeout_s:g}: "
            "rank 0 did not start, ended, or runs elsewhere; read its output, check MASTER_ADDR"
        )
    return (
        f"{who} got no answer from {where}, the job's store, within train.start_timeout_s={timeout_s:g} "
        f"({error}): a firewall drops the packets, or the machine is down"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
