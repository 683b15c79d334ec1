"""The NBD protocol: numbers, and bytes in and out. No sockets; server and client share it.

Source: the NBD specification (proto.md of the NetworkBlockDevice project). Section names are
given where a rule is not obvious.
"""

from __future__ import annotations

import errno
import struct
import unicodedata
from collections.abc import Iterable

from cowferry.errors import CowferryError

# Handshake -------------------------------------------------------------------------------
NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST = 1, 2, 3
OPT_STARTTLS, OPT_INFO, OPT_GO = 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERROR = 1 << 31
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = ERROR | 1, ERROR | 2, ERROR | 3
REP_ERR_PLATFORM, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN = ERROR | 4, ERROR | 5, ERROR | 6
REP_ERR_SHUTDOWN, REP_ERR_BLOCK_SIZE_REQD, REP_ERR_TOO_BIG = ERROR | 7, ERROR | 8, ERROR | 9

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

# Transmission flags
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
ROTATIONAL, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF = 16, 32, 64, 128
CAN_MULTI_CONN, SEND_RESIZE, SEND_CACHE, SEND_FAST_ZERO = 256, 512, 1024, 2048

# Transmission ----------------------------------------------------------------------------
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
CMD_FUA, CMD_NO_HOLE, CMD_DF, CMD_REQ_ONE, CMD_FAST_ZERO = 1, 2, 4, 8, 16

CHUNK_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS = 0, 1, 2, 5
CHUNK_ERROR, CHUNK_ERROR_OFFSET = 32769, 32770

STATE_HOLE, STATE_ZERO = 1, 2
STATE_DIRTY = 1  # of qemu:dirty-bitmap:NAME

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
DATA = struct.Struct(">IHHQIQ")  # a CHUNK of type data, with its offset
HOLE = struct.Struct(">IHHQIQI")  # a CHUNK of type hole, with its offset and length
OPTION = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")

MAX_STRING = 4096  # section "Strings"
MAX_OPTION = 1 << 16  # what we read of one option; the specification asks for no more
MAX_REQUEST = 32 << 20
PREFERRED = 4096

ERRNOS = {
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
}
LOCAL = {wire: code for code, wire in ERRNOS.items()}
ALIASES = {errno.EACCES: 1, errno.EROFS: 1, errno.EDQUOT: 28, errno.EFBIG: 28, errno.EBADF: 1}


def check_string(text: str, what: str) -> None:
    """Raise `CowferryError` for a name or description that a peer could not take or show.

    The specification wants at most 4096 bytes of UTF-8 without NUL. Other control characters
    would end a line, or move the cursor, where clients list exports. `what` is the error's
    subject."""
    odd = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)
    if odd is not None:
        raise CowferryError(
            f"{what} contains the character U+{ord(odd):04X}, which is no printable text"
        )
    size = len(text.encode())
    if size > MAX_STRING:
        raise CowferryError(f"{what} has {size} bytes; {MAX_STRING} are allowed")


def to_wire(code: int | None) -> int:
    """The protocol's number for an errno; EIO for what it has no number for."""
    if code is None:
        return 5
    return ERRNOS.get(code) or ALIASES.get(code) or 5


def from_wire(code: int) -> int:
    """The errno that an error number of a server stands for; EINVAL for an unknown one."""
    return LOCAL.get(code, errno.EINVAL)


def greeting() -> bytes:
    """What a fixed-newstyle server says first."""
    return struct.pack(">QQH", NBDMAGIC, IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)


def option_reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    """One reply to an option; error texts are clipped to what a string may have."""
    if kind & ERROR:
        payload = payload[:MAX_STRING]
    return OPTION_REPLY.pack(REPLY_MAGIC, option, kind, len(payload)) + payload


def server_entry(name: str, description: str = "") -> bytes:
    """Payload of REP_SERVER; what follows the name is for a person."""
    raw = name.encode()
    return struct.pack(">I", len(raw)) + raw + description.encode()[:MAX_STRING]


def info_export(size: int, flags: int) -> bytes:
    """Payload of INFO_EXPORT."""
    return struct.pack(">HQH", INFO_EXPORT, size, flags)


def info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    """Payload of INFO_BLOCK_SIZE."""
    return struct.pack(">HIII", INFO_BLOCK_SIZE, minimum, preferred, maximum)


def info_text(kind: int, text: str) -> bytes:
    """Payload of INFO_NAME or INFO_DESCRIPTION."""
    return struct.pack(">H", kind) + text.encode()[:MAX_STRING]


def parse_info(payload: bytes) -> tuple[str, list[int]] | None:
    """(export name, information asked for) of INFO and GO, or None if malformed."""
    if len(payload) < 6:
        return None
    (length,) = struct.unpack_from(">I", payload)
    if len(payload) < 6 + length:
        return None
    (count,) = struct.unpack_from(">H", payload, 4 + length)
    if len(payload) != 6 + length + 2 * count:
        return None
    try:
        name = payload[4 : 4 + length].decode()
    except UnicodeDecodeError:
        return None
    return name, list(struct.unpack_from(f">{count}H", payload, 6 + length))


def parse_meta(payload: bytes) -> tuple[str, list[str]] | None:
    """(export name, queries) of LIST and SET_META_CONTEXT, or None if malformed."""
    strings: list[str] = []
    try:
        (length,) = struct.unpack_from(">I", payload)
        name = payload[4 : 4 + length].decode()
        at = 4 + length
        (count,) = struct.unpack_from(">I", payload, at)
        at += 4
        for _ in range(count):
            (length,) = struct.unpack_from(">I", payload, at)
            raw = payload[at + 4 : at + 4 + length]
            if len(raw) != length or length > MAX_STRING:
                return None
            strings.append(raw.decode())
            at += 4 + length
    except (struct.error, UnicodeDecodeError):
        return None
    return (name, strings) if at == len(payload) else None


def meta_context(number: int, name: str) -> bytes:
    """Payload of REP_META_CONTEXT."""
    return struct.pack(">I", number) + name.encode()


def block_status(number: int, runs: Iterable[tuple[int, int]]) -> bytes:
    """Payload of a CHUNK_STATUS: (length, flags) of each run. Lengths are below 4 GiB."""
    return struct.pack(">I", number) + b"".join(struct.pack(">II", *r) for r in runs)


def error_chunk(cookie: int, code: int, text: str) -> bytes:
    """A final error chunk; the text is for a person."""
    raw = text.encode()[:MAX_STRING]
    payload = struct.pack(">IH", code, len(raw)) + raw
    return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, CHUNK_ERROR, cookie, len(payload)) + payload


# What a client sends, and what it is told ------------------------------------------------


def option(number: int, payload: bytes = b"") -> bytes:
    """One option."""
    return OPTION.pack(IHAVEOPT, number, len(payload)) + payload


def go(name: str, information: Iterable[int] = ()) -> bytes:
    """Payload of INFO and GO."""
    raw, wanted = name.encode(), list(information)
    return struct.pack(f">I{len(raw)}sH{len(wanted)}H", len(raw), raw, len(wanted), *wanted)


def meta(name: str, queries: Iterable[str]) -> bytes:
    """Payload of LIST and SET_META_CONTEXT."""
    strings = [q.encode() for q in queries]
    raw = name.encode()
    out = struct.pack(">I", len(raw)) + raw + struct.pack(">I", len(strings))
    return out + b"".join(struct.pack(">I", len(s)) + s for s in strings)


def parse_block_size(payload: bytes) -> tuple[int, int, int]:
    """(minimum, preferred, maximum) of INFO_BLOCK_SIZE. Raises `ValueError` for an absurd one."""
    _, minimum, preferred, maximum = struct.unpack(">HIII", payload)
    powers = all(n and not n & (n - 1) for n in (minimum, preferred))
    if not powers or minimum > 1 << 16 or not minimum <= preferred <= 1 << 25:
        raise ValueError(f"block sizes of {minimum} and {preferred} bytes")
    if maximum < preferred or (maximum != 0xFFFFFFFF and maximum % minimum):
        raise ValueError(f"a largest request of {maximum} bytes")
    return minimum, preferred, maximum


def parse_status(payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """(context, (length, flags) of each run) of a CHUNK_STATUS. Raises `ValueError`."""
    if len(payload) < 12 or len(payload) % 8 != 4:
        raise ValueError("a malformed block status")
    flat = struct.unpack(f">{len(payload) // 4}I", payload)
    if 0 in flat[1::2]:
        raise ValueError("a run of no bytes")
    return flat[0], list(zip(flat[1::2], flat[2::2], strict=True))


def parse_error(payload: bytes) -> tuple[int, str]:
    """(error number, text) of an error chunk. Raises `ValueError`."""
    if len(payload) < 6:
        raise ValueError("a malformed error")
    code, size = struct.unpack_from(">IH", payload)
    if not code or size > len(payload) - 6:
        raise ValueError("an error that is none")
    return code, payload[6 : 6 + min(size, MAX_STRING)].decode(errors="replace")
