"""A command that is refused, or that fails, leaves everything as it was.

Each verb of the command line and each QMP command has rows here that make it fail. Before and
after, all files around are compared: names, bytes, modes, owners and sizes, with the records and
bitmaps beside images; and so is what the daemon knows. What was made is gone, and what was there
is untouched. The text of the error advises nobody to remove what we did not make, or what is gone.

The tables are compared with the registries of verbs and commands: a new one without a row fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import click
import msgspec
import pytest

from cowferry import commands
from cowferry.cli import COMMANDS, group
from cowferry.errors import CowferryError
from houses import House, Witness
from refused_calls import CALLS, Arguments
from refused_lines import LINES
from scenes import Failed, cowferry
from storages import Mounts
from tests_support import need

#: Rows that fail because of a fault that is known and not mended yet, by that fault.
FAULTS: dict[str, tuple[str, ...]] = {}
PENDING = {row: why for why, rows in FAULTS.items() for row in rows}


# The tests -----------------------------------------------------------------------------------


def lines() -> list[str]:
    """Every line of the table, with its verb."""
    return [
        f"{verb} {line.strip()}"
        for verb, text in LINES.items()
        for line in text.splitlines()
        if line.strip()
    ]


@pytest.fixture(scope="session")
def ground() -> Iterator[Mounts]:
    """Where this worker's devices lie."""
    with Mounts() as made:
        yield made


class Houses:
    """The house of this worker, which is built anew after a test in which something changed."""

    def __init__(self, factory: pytest.TempPathFactory, ground: Mounts) -> None:
        self.factory = factory
        self.ground = ground
        self.house: House | None = None

    def get(self) -> House:
        """A house in which nothing has changed."""
        if self.house is None:
            folder = self.factory.mktemp("house")
            os.environ["COWFERRY_STATE"] = str(folder / "state")
            self.house = House(folder, self.ground)
        return self.house

    def close(self) -> None:
        """Leave it."""
        house, self.house = self.house, None
        if house is not None:
            house.close()


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory, ground: Mounts) -> Iterator[Houses]:
    need("qemu-img", "qemu-storage-daemon", "nbdinfo")
    before = os.environ.get("COWFERRY_STATE")
    made = Houses(tmp_path_factory, ground)
    yield made
    made.close()
    if before is not None:
        os.environ["COWFERRY_STATE"] = before


@pytest.fixture
def house(houses: Houses, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    found = houses.get()
    monkeypatch.setenv("COWFERRY_STATE", str(found.state))
    monkeypatch.setenv("COWFERRY_QMP", str(found.run / "qmp.sock"))
    monkeypatch.setenv("COWFERRY_RUN", str(found.run))
    monkeypatch.chdir(found.run)
    yield found


def compare(houses: Houses, house: House, witness: Witness, knew: Any, text: str) -> None:
    """Nothing has changed, and the text gives no bad advice."""
    problems = witness.differences() + witness.advice(text)
    now = house.known()
    problems += [f"{query} says otherwise: {knew[query]} became {now[query]}"
                 for query in knew if knew[query] != now[query]]  # fmt: skip
    if problems:
        houses.close()
    assert not problems, f"{text.strip()}\n" + "\n".join(problems)


@pytest.mark.parametrize("line", lines())
def test_unchanged_after_the_command_line(
    line: str, houses: Houses, house: House, request: pytest.FixtureRequest
) -> None:
    if line in PENDING:
        request.applymarker(pytest.mark.xfail(reason=PENDING[line], strict=True))
    given = line.format(f=house.folder, device=house.device, tiny=house.tiny, run=house.run)
    words = shlex.split(given)
    witness, knew = house.witness(), house.known()
    try:
        if words[0] == "serve":
            serve(*words[1:])
        else:
            cowferry(*words)
    except Failed as error:
        text = error.text
    else:
        houses.close()
        pytest.fail("it was not refused")
    assert text, "an error without a word"
    compare(houses, house, witness, knew, text)


def serve(*arguments: str) -> None:
    """Run a daemon as a program, which has to end by itself. Raises `Failed`."""
    command = [sys.executable, "-m", "cowferry", "serve", *arguments]
    run = os.path.join(os.environ["COWFERRY_RUN"], "second")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, env={**os.environ, "COWFERRY_RUN": run}
    )
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode:
        raise Failed(done.returncode, done.stderr)


def test_each_verb_has_lines() -> None:
    assert set(LINES) == set(COMMANDS)


def test_each_verb_refuses_an_unknown_option(houses: Houses, house: House) -> None:
    witness, knew = house.witness(), house.known()
    for words in verbs():
        with pytest.raises(Failed):
            cowferry(*words, "--frobnicate")
    compare(houses, house, witness, knew, "")


def verbs() -> list[list[str]]:
    """Every verb and verb of a group, as words."""
    out = []
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        below = command.commands if isinstance(command, click.Group) else {}
        out += [[name, sub] for sub in below] or [[name]]
    return out


def filled_in(value: Any, house: House) -> Any:
    """Arguments with the paths of the house."""
    if isinstance(value, dict):
        return {key: filled_in(v, house) for key, v in value.items()}
    if isinstance(value, list):
        return [filled_in(v, house) for v in value]
    if isinstance(value, str):
        return value.format(f=house.folder, device=house.device, tiny=house.tiny, run=house.run)
    return value


def told(error: CowferryError) -> str:
    """The text of an error as a client of QMP sees it."""
    return f"{error.desc}\n{error.hint}"


def calls() -> dict[str, tuple[str, Arguments]]:
    """Each command with arguments from the table, by a line that shows both."""
    out = {}
    for name, given in CALLS.items():
        for arguments in given:
            shown = (
                f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in arguments.items()
            )
            out[" ".join((name, *shown))] = (name, arguments)
    assert len(out) == sum(map(len, CALLS.values())), "two rows are called the same"
    return out


@pytest.mark.parametrize("call", calls())
def test_unchanged_after_a_qmp_command(
    call: str, houses: Houses, house: House, request: pytest.FixtureRequest
) -> None:
    if call in PENDING:
        request.applymarker(pytest.mark.xfail(reason=PENDING[call], strict=True))
    name, given = calls()[call]
    arguments = filled_in(given, house)
    witness, knew = house.witness(), house.known()
    try:
        house.daemon.execute(name, arguments)
        text = made_to_fail(house, arguments.get("job-id", ""))
    except CowferryError as error:
        text = told(error)
    if not text:
        houses.close()
        pytest.fail(f"{name} {arguments} was not refused")
    compare(houses, house, witness, knew, text)


def made_to_fail(house: House, job_id: str) -> str:
    """The error of a job that a command has started; empty if it did not fail."""
    job = house.daemon.jobs.get(job_id)
    if job is None or not job.wait(30):
        return ""
    text = job.error or ""
    with contextlib.suppress(CowferryError):
        house.daemon.execute("job-dismiss", {"id": job_id})
    return text


def test_each_qmp_command_has_arguments() -> None:
    commands.load()
    assert set(CALLS) == set(commands.COMMANDS)


def test_each_qmp_command_refuses_arguments_of_wrong_names_and_types(
    houses: Houses, house: House
) -> None:
    commands.load()
    witness, knew = house.witness(), house.known()
    for name in commands.COMMANDS:
        for arguments in wrong(commands.COMMANDS[name]):
            with pytest.raises(CowferryError):
                house.daemon.execute(name, arguments)
    compare(houses, house, witness, knew, "")


def wrong(command: commands.Command) -> Iterator[Arguments]:
    """Arguments of which one has an unknown name, one is missing, or one is of a wrong type."""
    if not issubclass(command.args, msgspec.Struct):
        return  # its members are the driver's, and have rows of their own
    hints = typing.get_type_hints(command.args)
    fields = {f.encode_name: f for f in msgspec.structs.fields(command.args)}
    required = {key: example(hints[f.name]) for key, f in fields.items() if f.required}
    yield {**required, "frobnicate": 1}
    for missing in required:
        yield {key: value for key, value in required.items() if key != missing}
    for key, field in fields.items():
        if hints[field.name] is not Any:
            yield {**required, key: "some" if hints[field.name] is float else 7.5}


def example(hint: Any) -> Any:
    """A value of that type."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[0]
    plain = typing.get_origin(hint) or hint
    return {str: "nosuch", int: 1, list: [], dict: {}}.get(plain)
