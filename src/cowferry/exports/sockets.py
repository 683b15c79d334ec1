"""Sockets that listen: made, shown and closed. The NBD server and the monitors share this."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from cowferry.block.peers import STOPPED, called, peer_of
from cowferry.errors import CowferryError
from cowferry.wire.address import Address


def shown(listener: socket.socket) -> str:
    """Where a socket listens, for a message."""
    try:
        name = listener.getsockname()
    except OSError:
        return "a listener"
    return f"'{name}'" if isinstance(name, str) else str(Address("", *name[:2]))


def holder_of(path: str) -> str:
    """The process that listens on a unix socket, in words, as far as /proc tells."""
    inodes: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/net/unix", encoding="utf-8") as f:
        for line in f:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[7].rstrip("\n") == path:
                inodes.add(f"socket:[{fields[6]}]")
    for pid in filter(str.isdigit, os.listdir("/proc") if inodes else ()):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                    return called(int(pid))
    return "another process"


def close_listeners(listeners: list[tuple[socket.socket, str | None]]) -> None:
    """Sockets that listen, and the paths to remove with them. Who waits for one is woken."""
    for sock, path in listeners:
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def address_of(sock: socket.socket) -> Address:
    """The address on which a TCP socket listens."""
    return Address("", *sock.getsockname()[:2])


def bind_tcp(address: Address) -> socket.socket:
    """A listening TCP socket on the first port of the address that is free.

    A host name that means several addresses is listened to on the first that can be had, IPv4
    before IPv6. Without a host it is every address. Raises `CowferryError`."""
    families = [(socket.AF_INET, address.ipv4), (socket.AF_INET6, address.ipv6)]
    wanted = [f for f, use in families if use] or [f for f, use in families if use is None]
    failure: OSError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for port in range(address.port, max(address.port, address.last) + 1):
        try:
            found = socket.getaddrinfo(
                address.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            failure = error
            break
        for family, where in sorted((f[0], f[4]) for f in found if f[0] in wanted):
            both = address.host == "::" and socket.AF_INET in wanted
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not both))
                    sock.bind(where)
                    sock.listen(128)
                except BaseException:
                    sock.close()
                    raise
                return sock
            except OSError as error:
                failure = error
    hint = "is another server there?" if failure.errno == errno.EADDRINUSE else ""
    raise CowferryError(f"cannot listen on {address}: {failure.strerror}", hint) from failure


def bind_unix(path: str, mode: int) -> socket.socket:
    """A listening unix socket at `path`, replacing a stale one. Raises `CowferryError`."""
    if len(os.fsencode(path)) > 107:
        raise CowferryError(f"socket path '{path}' is too long (107 bytes at most)")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.lexists(path):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise CowferryError(f"'{path}' exists and is not a socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)  # the backlog of a server that is stopped may be full
                try:
                    probe.connect(path)
                except ConnectionRefusedError:  # nobody listens: its server died
                    os.unlink(path)
                except BlockingIOError:
                    raise CowferryError(
                        f"'{path}': another server listens there, and does not answer",
                        f"its socket belongs to {holder_of(path)}; end that process first",
                    ) from None
                else:
                    who = peer_of(probe)
                    end = "cowferry stop"
                    if STOPPED in who:
                        end = f"kill -CONT {who.split()[1]}; {end}"
                    raise CowferryError(
                        f"'{path}': another server listens there: {who}",
                        f"stop it with: {end}; or use another path (COWFERRY_RUN=FOLDER)",
                    )
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise CowferryError(f"cannot listen on '{path}': {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return sock
