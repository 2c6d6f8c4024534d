"""Who has died: every rank keeps a TCP connection to rank 0, and the kernel tells when the other end is gone.

A process that is killed loses its connections within milliseconds, a machine that is lost or cut off within
`probing.FOUND_S`. A process that is slow, stopped or holds the interpreter's lock keeps them: its kernel answers.
"""

import errno
import os
import secrets
import selectors
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from moesys.parallel.probing import FOUND_S, probing

_CONNECT_S = float(FOUND_S)
_HELLO_BYTES = 40
_BACKLOG = 4096
_BYE = b"."


class Store(Protocol):
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A rank whose connection has ended without a farewell."""

    rank: int
    is_silent: bool
    """Its machine answers nothing any more; else the connection was closed, as at the end of a process."""


class Lifeline:
    """One rank's end. Not thread-safe: one thread polls."""

    def __init__(self, rank: int, store: Store) -> None:
        """Rank 0 listens and says in the store where; the others wait for that and connect."""
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, int] = {}
        self._strangers: dict[socket.socket, bytes] = {}  # and what each has said of its hello
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
                peer.sendall(_hello(token, rank))
                self._register(peer)
                self._peers[peer] = 0
            except OSError as error:
                print(
                    f"warning: rank {rank} cannot reach rank 0 at {host}:{port} ({error}): if it dies, "
                    "only a timeout will tell",
                    flush=True,
                )
        # A forked child would keep the connection open after this process died.
        os.register_at_fork(after_in_child=self.close)

    def poll(self, timeout_s: float) -> list[Lost]:
        """Wait at most so long; the ranks whose process or machine was lost since the last call."""
        found = []
        for key, _ in self._selector.select(timeout_s):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is self._server:
                self._accept()
            elif sock in self._strangers:
                self._hear(sock)
            elif (lost := self._read(sock)) is not None:
                found.append(lost)
        return found

    def leave(self) -> None:
        """Say that this process ends on purpose: what follows is no death. Callable from any thread."""
        for peer in list(self._peers):
            try:
                peer.sendall(_BYE)
            except OSError:
                continue  # gone before us

    def close(self) -> None:
        """Of the thread that polls, or after it."""
        for sock in [*self._peers, *self._strangers, *([self._server] if self._server else [])]:
            sock.close()
        self._peers.clear()
        self._strangers.clear()

    def _accept(self) -> None:
        assert self._server is not None
        peer, _ = self._server.accept()
        self._register(peer)
        self._strangers[peer] = b""

    def _register(self, peer: socket.socket) -> None:
        _keep_alive(peer)
        peer.setblocking(False)
        self._selector.register(peer, selectors.EVENT_READ)

    def _hear(self, stranger: socket.socket) -> None:
        """Read on in its hello, which the network may have cut in two."""
        said = self._strangers[stranger]
        try:
            more = stranger.recv(_HELLO_BYTES - len(said))
        except BlockingIOError:
            return
        except OSError:
            more = b""
        self._strangers[stranger] = said = said + more
        if more and len(said) < _HELLO_BYTES:
            return
        del self._strangers[stranger]
        rank = _rank_of(said, self._token)
        if rank is None:
            self._drop(stranger)  # not one of ours
        else:
            self._peers[stranger] = rank

    def _drop(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        peer.close()

    def _read(self, peer: socket.socket) -> Lost | None:
        """The rank at the other end, if it is lost."""
        said, reason = b"", 0
        try:
            said = peer.recv(1)
        except BlockingIOError:
            return None
        except OSError as error:
            reason = error.errno
        rank = self._peers.pop(peer)
        self._drop(peer)
        is_closed = reason in (0, errno.ECONNRESET, errno.EPIPE)
        return None if said == _BYE else Lost(rank=rank, is_silent=not is_closed)


def _hello(token: str, rank: int) -> bytes:
    return f"{token} {rank}".ljust(_HELLO_BYTES).encode()


def _rank_of(said: bytes, token: str) -> int | None:
    """Who says this hello; None for one that is not whole or does not know the token."""
    words = said.split()
    if len(said) < _HELLO_BYTES or len(words) != 2 or not words[1].isdigit():
        return None
    return int(words[1]) if secrets.compare_digest(words[0], token.encode()) else None


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
    """Let the kernel ask the other one, as `probing` says; TCP_KEEPALIVE is how macOS calls TCP_KEEPIDLE."""
    rule = probing(FOUND_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": rule.idle_s,
        "TCP_KEEPALIVE": rule.idle_s,
        "TCP_KEEPINTVL": rule.interval_s,
        "TCP_KEEPCNT": rule.count,
        # No question is asked while a hello or a farewell waits for its answer.
        "TCP_USER_TIMEOUT": rule.found_s * 1000,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
