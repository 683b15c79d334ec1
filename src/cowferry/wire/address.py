"""Addresses of servers: as a person types them, as QMP has them, as a URI shows them. No sockets.

Everything that takes the address of a socket reads it here, so that a wrong address gets the same
words everywhere: `serve --tcp`, `--nbd-server`, `--chardev`, QMP's SocketAddress, NBD URIs.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cowferry.errors import CowferryError

MAX_PATH = 107  # bytes of a unix socket's path
NBD_PORT = 10809
HIGHEST = (1 << 16) - 1  # port


class Address(NamedTuple):
    """Where a server is, or is to listen: a unix socket if `path` is not empty.

    `last`: the last port to try, if not `port` itself. `ipv4`, `ipv6`: whether that protocol may
    be used; None if nothing is said about it."""

    path: str
    host: str = ""
    port: int = 0
    last: int = 0
    ipv4: bool | None = None
    ipv6: bool | None = None

    def __str__(self) -> str:
        if self.path:
            return self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" + (f"-{self.last}" if self.last > self.port else "")

    def uri(self, export: str) -> str:
        """Return the NBD URI of an export there."""
        if self.path:
            path = quote(self.path, errors="surrogateescape")
            return f"nbd+unix:///{quote(export)}?socket={path}"
        host = quote(self.host, safe=":.[]")
        return f"nbd://{f'[{host}]' if ':' in host else host}:{self.port}/{quote(export)}"


def parse_tcp(text: str, what: str, default_host: str = "") -> Address:
    """Read HOST:PORT, [IPV6]:PORT or :PORT; PORT may be FIRST-LAST.

    `what` names the option in errors. Raises `CowferryError`."""
    expects = f"{what} expects HOST:PORT or [IPV6]:PORT, not '{text}'"
    host, colon, ports = text.rpartition(":")
    if not colon or not ports:
        raise CowferryError(expects)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise CowferryError(expects, "put an IPv6 address in brackets")
    first, dash, last = ports.partition("-")
    address = Address(
        "",
        _host(host, what) or default_host,
        _port(first, what),
        _port(last, what) if dash else 0,
    )
    if dash and address.last < address.port:
        raise CowferryError(f"{what}: port {last} is lower than port {first}")
    return address


def parse_uri(uri: str) -> tuple[Address, str]:
    """Return (server, export) of nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH.

    Raises `CowferryError`."""
    try:
        parts = urlsplit(uri)
        name = unquote(parts.path.removeprefix("/"), errors="strict")
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise CowferryError(f"'{uri}': {error}") from error
    if parts.scheme == "nbd+unix":
        paths = parse_qs(parts.query, errors="surrogateescape").get("socket")
        if not paths:
            raise CowferryError(f"'{uri}': no socket=PATH")
        return Address(_path(paths[0], f"'{uri}'")), name
    if parts.scheme == "nbd":
        # `hostname` is in lower case and without brackets
        host = _host(f"[{unquote(host)}]" if host and ":" in host else host or "", f"'{uri}'")
        if port == 0:
            raise CowferryError(f"'{uri}': no server listens on port 0")
        return Address("", host or "localhost", port or NBD_PORT), name
    if parts.scheme.startswith("nbds"):
        raise CowferryError(f"'{uri}': TLS is not supported", "use a tunnel, and nbd:// through it")
    raise CowferryError(f"'{uri}' is not an NBD URI", "nbd://HOST/NAME, nbd+unix:///NAME?socket=P")


MEMBERS = {"unix": {"path"}, "inet": {"host", "port"}}
LISTENING = {"unix": {"path"}, "inet": {"host", "port", "to", "ipv4", "ipv6"}}


def from_qmp(given: Mapping[str, Any], what: str = "addr", listen: bool = False) -> Address:
    """Read QMP's SocketAddress, flat or with the older member `data`.

    `what` is the name of the parameter. To `listen`, port 0 is allowed (any free port), and so are
    the members `to`, `ipv4` and `ipv6`. Raises `CowferryError` naming what is wrong."""
    kind = given.get("type")
    if kind is None:
        raise CowferryError(f"Parameter '{what}.type' is missing", "unix or inet")
    known = LISTENING if listen else MEMBERS
    if kind not in known:
        raise CowferryError(
            f"Parameter '{what}.type' does not accept value '{kind}'", "unix and inet are known"
        )
    rest: Any = given.get("data", {k: v for k, v in given.items() if k != "type"})
    if not isinstance(rest, Mapping):
        raise CowferryError(f"Invalid parameter type for '{what}.data', expected: object")
    if "data" in given and set(given) != {"type", "data"}:
        raise CowferryError(f"Parameter '{what}' has members beside 'data', which belong into it")
    for key in sorted(MEMBERS[kind] - set(rest)):
        raise CowferryError(f"Parameter '{what}.{key}' is missing")
    for key, value in rest.items():
        if key not in known[kind]:
            raise CowferryError(f"Parameter '{what}.{key}' is unexpected")
        if key not in ("ipv4", "ipv6") and (
            not isinstance(value, str | int) or isinstance(value, bool)
        ):
            raise CowferryError(f"Invalid parameter type for '{what}.{key}', expected: string")
    if kind == "unix":
        return Address(_path(str(rest["path"]), f"Parameter '{what}.path'"))
    text = str(rest["host"])
    bracketed = text.startswith("[") and text.endswith("]")
    host = _host(f"[{text}]" if ":" in text and not bracketed else text, f"Parameter '{what}.host'")
    port = _port(rest["port"], f"Parameter '{what}.port'")
    if not listen:
        host = host or "localhost"
    if not port and not listen:
        raise CowferryError(f"Parameter '{what}.port': no server listens on port 0")
    last = _port(rest.get("to", 0), f"Parameter '{what}.to'")
    if last and last < port:
        raise CowferryError(f"Parameter '{what}.to': port {last} is lower than port {port}")
    flags = {key: _flag(rest[key], f"{what}.{key}") for key in ("ipv4", "ipv6") if key in rest}
    if flags.get("ipv4") is False and flags.get("ipv6") is False:
        raise CowferryError(f"Parameters '{what}.ipv4' and '{what}.ipv6' leave no protocol")
    return Address("", host, port, last, **flags)


def _flag(value: Any, what: str) -> bool:
    if value in (True, "on", "yes", "true"):
        return True
    if value in (False, "off", "no", "false"):
        return False
    raise CowferryError(f"Parameter '{what}' expects 'on' or 'off'")


def _port(value: str | int, what: str) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit()):
        raise CowferryError(f"{what}: '{text}' is no port number")
    if len(text) > 5 or int(text) > HIGHEST:
        raise CowferryError(f"{what}: port {text} is higher than {HIGHEST}")
    return int(text)


def _host(text: str, what: str) -> str:
    """A name or address; an IPv6 address is in brackets, and comes back without."""
    if text.startswith("[") and text.endswith("]"):
        bare = text[1:-1]
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise CowferryError(f"{what}: '{bare}' is no IPv6 address") from None
        return bare
    try:
        if text and (not text.isprintable() or set(text) & set(" :[]/?#@%")):
            raise UnicodeError
        text.encode("idna")
    except UnicodeError:
        raise CowferryError(f"{what}: '{text}' is no host name") from None
    return text


def _path(text: str, what: str) -> str:
    if not text or "\0" in text:
        raise CowferryError(f"{what}: '{text}' is no path of a socket")
    try:
        size = len(text.encode("utf-8", "surrogateescape"))
    except UnicodeError:
        raise CowferryError(f"{what}: '{text}' is no path of a socket") from None
    if size > MAX_PATH:
        raise CowferryError(f"{what}: '{text}' is too long for a socket ({MAX_PATH} bytes at most)")
    return text
