"""Where the job's store is to be, and what can be wrong with that before torch is imported, which takes seconds."""

import errno
import socket

from moesys.parallel.launcher import Place


def refuse_store_address(place: Place) -> None:
    """Raises ValueError for a host that nobody knows, or a port that rank 0 cannot have. Waits for nothing."""
    host, port = place.store_host, place.store_port
    if place.world_size == 1 or host is None or port is None:
        return
    try:
        socket.getaddrinfo(host, port)
    except socket.gaierror as error:
        if error.errno != socket.EAI_AGAIN:  # a name service that is late
            raise ValueError(unresolved(place, error)) from error
    if place.rank == 0 and not place.agent_has_store:
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(taken(port)) from error


def spell_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unresolved(place: Place, error: socket.gaierror) -> str:
    return (
        f"rank {place.rank} on {place.node} cannot resolve {place.store_host!r}, the machine of the job's store "
        f"({error.strerror}): set MASTER_ADDR to its address, or add the name to /etc/hosts or the name service"
    )


def taken(
    port: int,
    reason: str = "another program listens there, perhaps an earlier job that has not ended",
) -> str:
    return (
        f"rank 0 cannot serve the job's store on port {port}: {reason}; set MASTER_PORT to a free port for all "
        "ranks, or end what has this one (ss -ltnp)"
    )
