"""The layer rule of docs/design.md, section 6, and the other promises about the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "cowferry"
LONGEST = 800  # lines of a file

# Who may import whom, besides itself. A layer is the first part of a module's name.
BELOW_GRAPH = {"errors", "wire", "block", "drivers", "exports", "jobs"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "wire": {"errors"},
    "block": {"errors"},
    "drivers": {"errors", "block", "wire"},
    "exports": {"errors", "block", "wire"},
    "jobs": {"errors", "block"},
    "graph": BELOW_GRAPH,
    "operations": BELOW_GRAPH | {"graph"},
    "commands": BELOW_GRAPH | {"graph", "operations"},
    "monitor": BELOW_GRAPH | {"graph", "commands"},
    "daemon": BELOW_GRAPH | {"graph", "commands", "monitor"},
    "cli": BELOW_GRAPH | {"graph", "commands", "monitor", "daemon", ""},
    # What `import cowferry` offers: a facade over the layers.
    "library": BELOW_GRAPH | {"graph", "daemon"},
    "": {"errors", "library"},
    "__main__": {"cli"},
}
# Typed commands name the daemon that they act on, a front end its events, and the daemon what an
# operation keeps with it: for the type checker only, never when it runs.
NAMED_IN_TYPES: dict[str, set[str]] = {
    "operations": {"daemon"}, "commands": {"daemon"}, "monitor": {"daemon"},
    "daemon": {"operations"},
}  # fmt: skip


# Of the jobs: what all of them stand on. (An active commit is a mirror with another target.)
SHARED_BY_JOBS = {
    "jobs", "jobs.job", "jobs.ending", "jobs.states", "jobs.group", "jobs.mirror", "jobs.follow",
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name below cowferry, path) of every module."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), path


def in_type_checking(tree: ast.Module) -> set[ast.AST]:
    """Every node below an `if TYPE_CHECKING:`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for statement in node.body:
                found.update(ast.walk(statement))
    return found


def imports(text: str, package: str) -> Iterator[tuple[str, bool]]:
    """(module below cowferry, only for the type checker) of each import, wherever it stands."""
    tree = ast.parse(text)
    types_only = in_type_checking(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = f"cowferry.{package}".rstrip(".").split(".")
                kept = above[: len(above) - node.level + 1]
                origin = ".".join([*kept, origin] if origin else kept)
            # `from cowferry import graph` imports a layer, `from cowferry import open` the facade.
            names = [
                f"{origin}.{alias.name}"
                if origin == "cowferry"
                and ((SOURCE / alias.name).is_dir() or (SOURCE / f"{alias.name}.py").exists())
                else origin
                for alias in node.names
            ]
        for name in names:
            if name == "cowferry" or name.startswith("cowferry."):
                yield name.removeprefix("cowferry").removeprefix("."), node in types_only


def layer(module: str) -> str:
    return module.split(".")[0]


def breaches(name: str, text: str, is_package: bool) -> list[str]:
    """What the rule has against a module, in words."""
    mine = layer(name)
    assert mine in MAY_IMPORT, f"cowferry.{name} belongs to no layer: give it one, here"
    package = name if is_package else name.rpartition(".")[0]
    found = []
    for imported, types_only in imports(text, package):
        theirs = layer(imported)
        allowed = MAY_IMPORT[mine] | {mine}
        if types_only:
            allowed = allowed | NAMED_IN_TYPES.get(mine, set())
        if theirs not in allowed:
            found.append(f"cowferry.{name} imports cowferry.{imported}")
        # Neighbours in these folders do not know each other: one new file is one new part.
        if mine == theirs == "jobs" and imported not in SHARED_BY_JOBS:
            found.append(f"cowferry.{name} imports its neighbour cowferry.{imported}")
    return found


def test_no_module_imports_above_its_layer() -> None:
    wrong = [
        breach
        for name, path in modules()
        for breach in breaches(name, path.read_text(), path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("drivers.raw", "from cowferry.block.disk import Disk\nfrom cowferry.graph import Graph"),
        ("drivers.raw", "from cowferry import graph"),
        ("drivers.raw", "from ..exports import nbd"),
        ("jobs.stream", "def f():\n    import cowferry.drivers.raw"),
        ("jobs.stream", "from cowferry.jobs.create import Create"),
        ("exports.nbd", "from cowferry.jobs import job"),
        ("wire.nbd", "from cowferry.block import node"),
        ("block.copy", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
         "    from cowferry.drivers.file import File"),
        ("monitor.qmp", "from cowferry.cli import run"),
        ("commands.block", "from cowferry.daemon import Daemon"),
        ("block.copy", "import cowferry"),
    ],
)  # fmt: skip
def test_a_breach_of_the_rule_is_found(module: str, line: str) -> None:
    assert breaches(module, line, is_package=False)


def test_drivers_never_see_a_disk() -> None:
    for name, path in modules():
        if layer(name) == "drivers":
            seen = {module for module, _ in imports(path.read_text(), "drivers")}
            assert not seen & {"block.disk", "block.gate", "block.lease", "block.lane"}, name


def test_wire_codecs_know_no_sockets() -> None:
    for name, path in modules():
        if layer(name) == "wire":
            names = {
                alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in (
                    node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")]
                )
            }
            assert not names & {"socket", "selectors", "select", "asyncio", "ssl", "threading"}, (
                name
            )


def test_image_changing_calls_go_through_the_recorder() -> None:
    """The crash tests see what goes through block/sysio.py, and nothing else."""
    calls = {"pwrite", "pwritev", "ftruncate", "fsync", "fdatasync", "copy_file_range", "rename",
             "replace", "posix_fallocate", "truncate", "link", "unlink", "remove",
             "O_CREAT"}  # fmt: skip
    wrong = []
    for name, path in modules():
        images = ("block", "drivers", "jobs", "operations", "exports")
        if layer(name) not in images or name == "block.sysio":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                sockets = layer(name) == "exports" and node.attr == "unlink"
                if node.value.id == "os" and node.attr in calls and not sockets:
                    wrong.append(f"{name}:{node.lineno} os.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_a_codec_loads_nothing_of_the_house() -> None:
    """`import cowferry` is cheap: what is not used is not loaded."""
    program = (
        "import sys, cowferry.wire.nbd, cowferry.wire.qmp; "
        "print(*(m for m in sys.modules if m.startswith('cowferry')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {
        "cowferry", "cowferry.errors", "cowferry.wire", "cowferry.wire.nbd", "cowferry.wire.qmp"
    }  # fmt: skip


def test_files_stay_short() -> None:
    paths = [p for folder in ("src", "tests", "tools") for p in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 50
    long = {str(p): n for p in paths if (n := len(p.read_text().splitlines())) >= LONGEST}
    assert not long


def test_every_module_opens_with_what_it_is() -> None:
    silent = [
        name
        for name, path in modules()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = { text = "Apache-2.0" }' in (ROOT / "pyproject.toml").read_text()
