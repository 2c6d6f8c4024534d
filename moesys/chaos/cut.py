"""A rank that hears nothing: its TCP sockets drop all that arrives, by the kernel's own filter (Linux, no root).

What it sends still leaves, once: no answer reaches it, so nothing is acknowledged and its kernel soon sends
little more. When the cut ends TCP sends again what was lost, up to twice the cut later. InfiniBand is not cut.
"""

import ctypes
import os
import socket
import struct
import sys
import threading
import time
from contextlib import suppress

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
"""Not in Python's socket module; the same on all of Linux's common machines."""
_RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
"""BPF_RET | BPF_K, 0: of each packet keep 0 bytes."""
_RESCAN_S = 0.02


def why_not() -> str | None:
    """Why sockets cannot be cut here; None where a packet to ourselves was seen to be dropped."""
    if sys.platform != "linux":
        return f"socket filters are Linux's, and this is {sys.platform}"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        probe.settimeout(0.05)
        try:
            _attach(probe)
            probe.sendto(b"x", probe.getsockname())
            probe.recv(1)
        except TimeoutError:
            return None
        except OSError as error:
            return f"the kernel takes no socket filter: {error.strerror}"
    return "the kernel takes a socket filter and does not use it"


def cut(seconds: float) -> threading.Thread:
    """Cut this process's TCP sockets, those opened meanwhile too, for `seconds`. Returns at once."""
    known: set[int] = _cut_all(set())
    until_s = time.monotonic() + seconds

    def hold() -> None:
        nonlocal known
        while time.monotonic() < until_s:
            time.sleep(_RESCAN_S)
            known = _cut_all(known)
        for sock in _tcp_sockets():
            with sock, suppress(OSError):  # one without a filter
                sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    thread = threading.Thread(target=hold, name="chaos-cut", daemon=True)
    thread.start()
    return thread


def _cut_all(known: set[int]) -> set[int]:
    """Cut the sockets whose inodes are not `known`; return all inodes."""
    found: set[int] = set()
    for sock in _tcp_sockets():
        with sock:
            inode = os.fstat(sock.fileno()).st_ino
            found.add(inode)
            if inode not in known:
                _attach(sock)
    return found


def _tcp_sockets() -> list[socket.socket]:
    """This process's, as duplicates to be closed."""
    found: list[socket.socket] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed since it was listed
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
            found.append(sock)
        else:
            sock.close()
    return found


def _attach(sock: socket.socket) -> None:
    program = ctypes.create_string_buffer(_RETURN_NOTHING)
    # struct sock_fprog: a length, and a pointer aligned as pointers are.
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program))
    )
