"""Reading compressed clusters: raw deflate, or zstd where its library is installed.

A bomb gets no further than one cluster: the output is capped, and what is short is an error.
"""

from __future__ import annotations

import errno
import importlib
import zlib
from typing import Any

from cowferry.drivers.qcow2.clusters import no_decompressor


def _zstd() -> Any:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    return None


def inflate(name: str, kind: int, data: bytes, size: int, offset: int) -> bytes:
    """One cluster of `size` bytes out of `data`; `offset` is the guest's, for the error.

    `data` ends somewhere behind the stream's end. Raises `OSError`."""
    try:
        if kind == 0:
            out = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        else:
            zstd = _zstd()
            if zstd is None:
                raise no_decompressor(name)
            out = zstd.ZstdDecompressor().decompress(data, size)
    except OSError:
        raise
    except Exception as error:  # each library has its own class
        raise OSError(
            errno.EIO, f"{name}: damaged compressed cluster at offset {offset}: {error}"
        ) from error
    if len(out) != size:
        raise OSError(errno.EIO, f"{name}: short compressed cluster at offset {offset}")
    return out
