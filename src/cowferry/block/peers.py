"""The other end of a socket: which program or host it is, and whether it is still there."""

from __future__ import annotations

import socket
import struct

from cowferry.errors import one_line

STOPPED = "which is stopped"  # what is said of a process that SIGSTOP has stopped
PROBES = 4  # that a silent peer gets before it is taken to be gone


def watch_peer(sock: socket.socket, seconds: float) -> None:
    """Let a TCP connection fail if its peer does not react for so many seconds: its host died, or
    the network is gone, and nobody says so."""
    between = max(int(seconds / (PROBES + 2)), 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2 * between)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(seconds * 1000), 1))


def pid_of(sock: socket.socket) -> int:
    """The process at the other end of a connected unix socket; 0 if it cannot be seen from here."""
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return 0
    return max(int(struct.unpack("iII", credentials)[0]), 0)


def peer_of(sock: socket.socket) -> str:
    """The program or host at the other end of a socket, in words."""
    try:
        if sock.family != socket.AF_UNIX:
            host, port = sock.getpeername()[:2]
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    except OSError:
        return "a host that has gone"
    pid = pid_of(sock)
    return called(pid) if pid else "another program"


def called(pid: int) -> str:
    """A process by its number and name, and whether it is stopped, in words."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            head, _, rest = f.read().rpartition(")")
    except OSError:
        return f"pid {pid}, which has ended"
    state = f", {STOPPED}" if rest.split()[:1] in (["T"], ["t"]) else ""
    return f"pid {pid} ({one_line(head.partition('(')[2])}{state})"
