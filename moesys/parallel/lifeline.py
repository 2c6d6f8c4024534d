"""Who has died: every rank keeps a TCP connection to rank 0, and the kernel tells when the other end is gone.

A process that is killed loses its connections within milliseconds, a machine that is lost within
SILENCE_S. A process that is slow, stopped or holds the interpreter's lock keeps them: its kernel answers.
"""

import os
import secrets
import selectors
import socket
from contextlib import suppress
from typing import Protocol

SILENCE_S = 5
"""A machine that answers no probe of its kernel for so long is lost."""
_CONNECT_S = 5.0
_HELLO_S = 1.0
_HELLO_BYTES = 40
_BACKLOG = 4096
_BYE = b"."


class Store(Protocol):
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...


class Lifeline:
    """One rank's end. Not thread-safe: one thread polls."""

    def __init__(self, rank: int, store: Store) -> None:
        """Rank 0 listens and says in the store where; the others wait for that and connect."""
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, int] = {}
        self._server: socket.socket | None = None
        if rank == 0:
            self._token = secrets.token_hex(_HELLO_BYTES // 4)
            self._server = _listen()
            self._selector.register(self._server, selectors.EVENT_READ)
            store.set("lifeline", f"{_own_host()} {self._server.getsockname()[1]} {self._token}")
        else:
            host, port, token = store.get("lifeline").decode().split()
            try:
                peer = socket.create_connection((host, int(port)), timeout=_CONNECT_S)
                _keep_alive(peer)
                peer.sendall(_hello(token, rank))
                self._watch(peer, 0)
            except OSError as error:
                print(
                    f"warning: rank {rank} cannot reach rank 0 at {host}:{port} ({error}): if it dies, "
                    "only a timeout will tell",
                    flush=True,
                )
        # A forked child would keep the connection open after this process died.
        os.register_at_fork(after_in_child=self.close)

    def poll(self, timeout_s: float) -> list[int]:
        """Wait at most so long; the ranks whose process or machine was lost since the last call."""
        lost = []
        for key, _ in self._selector.select(timeout_s):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is self._server:
                self._accept()
            elif (rank := self._read(sock)) is not None:
                lost.append(rank)
        return lost

    def leave(self) -> None:
        """Say that this process ends on purpose: what follows is no death. Callable from any thread."""
        for peer in list(self._peers):
            try:
                peer.sendall(_BYE)
            except OSError:
                continue  # gone before us

    def close(self) -> None:
        """Of the thread that polls, or after it."""
        for sock in [*self._peers, *([self._server] if self._server else [])]:
            sock.close()
        self._peers.clear()

    def _accept(self) -> None:
        assert self._server is not None
        peer, _ = self._server.accept()
        peer.settimeout(_HELLO_S)
        try:
            token, rank = peer.recv(_HELLO_BYTES, socket.MSG_WAITALL).decode().split()
        except (OSError, ValueError):
            token, rank = "", ""
        if secrets.compare_digest(token, self._token):
            _keep_alive(peer)
            self._watch(peer, int(rank))
        else:
            peer.close()  # not one of ours

    def _watch(self, peer: socket.socket, rank: int) -> None:
        peer.setblocking(False)
        self._peers[peer] = rank
        self._selector.register(peer, selectors.EVENT_READ)

    def _read(self, peer: socket.socket) -> int | None:
        """The rank at the other end, if it is lost."""
        try:
            said = peer.recv(1)
        except BlockingIOError:
            return None
        except OSError:
            said = b""
        self._selector.unregister(peer)
        rank = self._peers.pop(peer)
        peer.close()
        return None if said == _BYE else rank


def _hello(token: str, rank: int) -> bytes:
    return f"{token} {rank}".ljust(_HELLO_BYTES).encode()


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # built in, but switched off on this machine
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
            )
    return socket.create_server(("", 0), backlog=_BACKLOG)


def _own_host() -> str:
    """How the other ranks reach this one: by the address that it has on the way to the job's store."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    for family, kind, protocol, _, address in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:  # sends nothing
            try:
                probe.connect(address)
            except OSError:
                continue
            own = probe.getsockname()[0]
            # The store is here: they reach it by its name.
            return master if own.startswith("127.") or own == "::1" else own
    return master


def _keep_alive(sock: socket.socket) -> None:
    """Let the kernel ask the other one every second once it was silent for two, and give up after SILENCE_S."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": 2,
        "TCP_KEEPALIVE": 2,
        "TCP_KEEPINTVL": 1,
        "TCP_KEEPCNT": SILENCE_S - 2,
    }
    for name, value in options.items():  # TCP_KEEPALIVE is how macOS calls TCP_KEEPIDLE
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
