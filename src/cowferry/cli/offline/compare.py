"""`cowferry compare`: do two images hold the same."""

from __future__ import annotations

import sys

import click

from cowferry.block.node import Node, State, read, resolve
from cowferry.cli import complain
from cowferry.cli.offline import image
from cowferry.errors import CowferryError

STEP = 1 << 20


@click.command("compare")
@click.option("-f", "first_format", metavar="FMT", help="Format of FIRST [by its name].")
@click.option("-F", "second_format", metavar="FMT", help="Format of SECOND [by its name].")
@click.option("-s", "strict", is_flag=True, help="Different sizes or allocation are a difference.")
@click.option("-U", "--force-share", is_flag=True, help="Even while open elsewhere.")
@click.option("-p", "show_progress", is_flag=True, help="Taken for compatibility.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-T", "cache", metavar="MODE", help="Taken for compatibility.")
@click.argument("first")
@click.argument("second")
def compare_command(
    first_format: str | None, second_format: str | None, strict: bool, force_share: bool,
    show_progress: bool, quiet: bool, cache: str | None, first: str, second: str,
) -> int:  # fmt: skip
    """Compare FIRST and SECOND. Exit code: 0 identical, 1 different, 2 open failed, 4 I/O error."""

    def say(text: str) -> None:
        if not quiet:
            click.echo(text)

    try:
        with (
            image(first, first_format, force_share=force_share) as a,
            image(second, second_format, force_share=force_share) as b,
        ):
            try:
                return compare(a, b, strict, say)
            except OSError as error:
                click.echo(f"cowferry: {error}", err=True)
                return 4
    except CowferryError as error:
        complain(error)
        sys.exit(2)


def compare(a: Node, b: Node, strict: bool, say: object) -> int:
    """qemu-img's way: a longer image must be zero where the other ends."""
    assert callable(say)
    shorter, longer = sorted((a, b), key=lambda n: n.size)
    if a.size != b.size and strict:
        say("Strict mode: Image size mismatch!")
        return 1
    left = memoryview(bytearray(STEP))
    right = memoryview(bytearray(STEP))
    for start in range(0, shorter.size, STEP):
        n = min(STEP, shorter.size - start)
        states = [_states(x, start, n) for x in (a, b)]
        if strict and states[0] != states[1]:
            say(f"Strict mode: Offset {start} block status mismatch!")
            return 1
        if all(s == {State.ZERO} for s in states):
            continue
        read(a, left[:n], start)
        read(b, right[:n], start)
        if left[:n] != right[:n]:
            at = next(i for i in range(n) if left[i] != right[i])
            say(f"Content mismatch at offset {start + at}!")
            return 1
    if a.size != b.size:
        say("Warning: Image size mismatch!")
        for start in range(shorter.size, longer.size, STEP):
            n = min(STEP, longer.size - start)
            if _states(longer, start, n) == {State.ZERO}:
                continue
            read(longer, left[:n], start)
            if any(left[:n]):
                at = next(i for i in range(n) if left[i])
                say(f"Content mismatch at offset {start + at}!")
                return 1
    say("Images are identical.")
    return 0


def _states(node: Node, offset: int, length: int) -> set[State]:
    return {e.state for e in resolve(node, offset, length)}
