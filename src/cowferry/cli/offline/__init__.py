"""The offline commands: what qemu-img does, with its options, JSON and exit codes.

This module holds what several of them share: opening the images that their options name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from cowferry.block import names, sysio
from cowferry.block.node import Node, chain, files
from cowferry.cli.keyval import parse_option
from cowferry.drivers import formats, opening, partial
from cowferry.drivers import options as creation
from cowferry.errors import CowferryError, ImageError, reason


@contextmanager
def image(
    name: str,
    format: str | None = None,
    *,
    read_only: bool = True,
    backing: bool = True,
    force_share: bool = False,
    image_opts: bool = False,
    repair: bool = False,
    headers: bool = False,
) -> Iterator[Node]:
    """The node that an image argument names, closed at the end; `headers` as in
    `opening.open_node`. Raises `CowferryError`."""
    if image_opts:
        if format is not None:
            raise CowferryError("--image-opts and --format are mutually exclusive")
        options = _complete(parse_option(name, "driver"))
        given = {"read-only": read_only, "force-share": force_share, "repair": repair}
        options = {**given, **options}
        node = opening.open_node(options, headers=headers)
    else:
        if not (names.is_uri(name) or os.path.exists(name)):
            hint = ""
            if name.startswith(("json:", "nbd:")):
                hint = "cowferry takes this for a file name; give options with --image-opts, and "
                hint += "an export as nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH"
            raise ImageError(f"Could not open '{name}': No such file or directory", hint)
        node = opening.open_image(
            name,
            format,
            read_only=read_only,
            backing=backing,
            force_share=force_share,
            repair=repair,
            headers=headers,
        )
    with closed(node):
        partial.check_bare(node)
        yield node


def _complete(options: dict[str, Any]) -> dict[str, Any]:
    """What an option string leaves out: a file name alone means a host file."""
    for key in ("file", "data-file"):
        child = options.get(key)
        if isinstance(child, dict) and "filename" in child:
            options[key] = {"driver": "file", **child}
    if "driver" not in options and isinstance(name := options.get("filename"), str):
        file = {"driver": "file", "filename": options.pop("filename")}
        return {"driver": formats.format_of(name), "file": file, **options}
    return options


@contextmanager
def closed(node: Node) -> Iterator[None]:
    """An image and its chain are closed at the end. If that fails, too, the first error counts."""
    try:
        yield
    except BaseException:
        with suppress(OSError, CowferryError):
            opening.close_chain(node)
        raise
    try:
        opening.close_chain(node)
    except OSError as error:
        raise ImageError(
            f"Could not close '{node.filename}': {reason(error, node.filename)}"
        ) from error


CACHES = {"none": True, "off": True, "directsync": True}
CACHES |= {"writeback": False, "writethrough": False, "unsafe": False}


def cached(mode: str | None, of: str = "") -> bool:
    """Whether a cache mode (-t, -T) lets the kernel keep an image's bytes. Raises `CowferryError`.

    Every command makes durable what it has written before it ends, whatever the mode. With none and
    directsync the kernel is told to forget the bytes, because they are not read past its cache."""
    if mode is not None and mode not in CACHES:
        raise CowferryError(
            f"Invalid {of}cache option: {mode}", f"the modes are {', '.join(sorted(CACHES))}"
        )
    return mode is None or not CACHES[mode]


def check_backing(options: Mapping[str, Any]) -> None:
    """Raise `CowferryError` unless a backing file and its format are given together, or neither."""
    name, format = options.get("backing_file"), options.get("backing_fmt")
    if name == "":
        raise CowferryError("Expected backing file name, got empty string", "leave -b out")
    if name and not format:
        raise CowferryError(
            "backing file specified without backing format", "add -F FORMAT (raw, qcow2, qed)"
        )
    creation.check_backing(options)
    creation.check_format(format)


def forget(node: Node | None) -> None:
    """Have the kernel forget what it has cached of an image and its chain, once it is written."""
    for layer in chain(node):
        for file in files(layer):
            own = sysio.another(file.fd) if file.fd >= 0 else -1
            if own >= 0:
                try:
                    sysio.let_go(own, 0, 0)
                finally:
                    os.close(own)


def creation_options(texts: tuple[str, ...]) -> dict[str, Any]:
    """The `-o key=value,...` options, later ones winning. Raises `CowferryError`."""
    out: dict[str, Any] = {}
    for text in texts:
        out |= _flat(parse_option(text))
    return out


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
