"""The layers of docs/design.md, section 6: who may import whom. And files that stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "cowferry"

#: What each part may import, besides itself.
MAY = {
    "errors": set(),
    "wire": {"errors"},
    "block": {"errors"},
    "drivers": {"errors", "block", "wire"},
    "exports": {"errors", "block", "wire"},
    "jobs": {"errors", "block"},
    "graph": {"errors", "block", "drivers", "exports", "jobs"},
    "commands": {"errors", "block", "drivers", "exports", "jobs", "graph"},
    "monitor": {"errors", "block", "wire", "drivers", "exports", "jobs", "graph", "commands"},
    "daemon": {
        "errors", "block", "wire", "drivers", "exports", "jobs", "graph", "commands", "monitor",
    },
    "cli": {
        "errors", "block", "wire", "drivers", "exports", "jobs", "graph", "commands", "monitor",
        "daemon",
    },
}  # fmt: skip


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The parts of cowferry that a module imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "cowferry":
                names = [f"cowferry.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("cowferry.")}
    return found


def test_every_module_imports_only_what_its_layer_may() -> None:
    seen = 0
    for path in SOURCE.rglob("*.py"):
        part = part_of(path)
        if part in ("__init__", "__main__"):
            continue
        seen += 1
        wrong = imports(path) - MAY[part] - {part}
        assert not wrong, f"{path.relative_to(SOURCE)} imports {sorted(wrong)}"
    assert seen > 40


def test_wire_codecs_touch_no_socket() -> None:
    for path in (SOURCE / "wire").glob("*.py"):
        names = {a.name for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Import) for a in n.names}  # fmt: skip
        assert not names & {"socket", "asyncio", "threading", "os"}, path


def test_files_stay_under_eight_hundred_lines() -> None:
    for path in [*SOURCE.rglob("*.py"), *Path(__file__).parent.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 800, path
