"""Who may import whom: docs/architecture.md's table, held against the imports that stand in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "architecture.md"
HEADER = "| room | holds | may import |"
PACKAGE = "commvlm"
FACE = "the package itself"
"""commvlm/__init__.py: it shows the model room's classes, which a room must not take from there."""


def table(text: str) -> dict[str, set[str]]:
    """room -> the rooms that it may import, from the rows "| `train/` | ... | model, data, evaluate |" below HEADER."""
    lines = text.split(f"{HEADER}\n")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {match[1]: row[-1] for row in cells if (match := re.fullmatch(r"`(\w+)(?:/|\.py)`", row[0]))}
    everything = {*rows, FACE}
    words = {"(nothing of ours)": set(), "all": everything, "all but cli": everything - {"cli"}}
    allowed = {room: words[said] if said in words else set(re.split(r",\s*", said)) for room, said in rows.items()}
    for room, others in allowed.items():
        assert others <= everything, f"the row of {room} names {others - everything}"
    return {**allowed, FACE: {"model"}}


def imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of the package in a file, wherever in it and however written."""
    inside = [PACKAGE, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            said = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names = [f"{PACKAGE}{name}" if name.startswith(".") else name for name in said]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == PACKAGE)


def room(parts: list[str], rooms: set[str]) -> str:
    """The room of a dotted name's or a path's parts, without the package's own."""
    first = parts[0].removesuffix(".py") if parts else ""
    return first if first in rooms else FACE


def faults(package: Path, allowed: dict[str, set[str]]) -> list[str]:
    """Every import that the table does not allow, and every file in a room that it does not have."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).parts)
        here = room(parts, set(allowed))
        if here == FACE and parts != ["__init__.py"]:
            found.append(f"{'/'.join(parts)} is in no room of the table")
        for line, name in imported(path, package):
            there = room(name.split(".")[1:], set(allowed))
            if there not in (here, *allowed[here]):
                found.append(f"{'/'.join(parts)}:{line} imports {name}, {here} may not import {there}")
    return found


@pytest.fixture(scope="module")
def allowed() -> dict[str, set[str]]:
    return table(TABLE.read_text(encoding="utf-8"))


def test_the_table_says_what_the_design_says(allowed):
    rooms = {"model", "data", "evaluate", "probe", "microworld", "train", "study", "app", "cli"}
    assert set(allowed) == {*rooms, FACE}
    assert allowed["model"] == allowed["data"] == set()
    assert allowed["evaluate"] == {"data"}
    assert allowed["probe"] == {"data", "model", "evaluate"}
    assert allowed["microworld"] == {"data", "model", "probe"}
    assert allowed["train"] == {"model", "data", "evaluate"}
    assert not any("cli" in allowed[name] for name in rooms - {"cli"})


def test_imports_go_the_way_of_the_table(allowed):
    assert faults(ROOT / "src" / PACKAGE, allowed) == []


def test_imports_are_found_at_all(allowed):
    """A checker that finds nothing finds no fault either."""
    package = ROOT / "src" / PACKAGE
    seen = {
        (room(list(path.relative_to(package).parts), set(allowed)), room(name.split(".")[1:], set(allowed)))
        for path in package.rglob("*.py")
        for _, name in imported(path, package)
    }
    for arrow in (("evaluate", "data"), ("train", "model"), ("microworld", "data"), ("app", "train"), ("cli", "train")):
        assert arrow in seen


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model/merge.py", "from ..data.boxes import PadSquare"),
        ("model/merge.py", "from .. import data"),
        ("model/merge.py", "import commvlm.data.boxes"),
        ("model/merge.py", "import commvlm.data as d"),
        ("data/readers/pope.py", "from ...model import CommConfig"),
        ("data/readers/pope.py", "def f():\n    from commvlm.model import CommConfig"),
        ("data/readers/pope.py", "import importlib\nimportlib.import_module('commvlm.model')"),
        ("evaluate/run.py", "from ..model.modeling import CommModel"),
        ("evaluate/run.py", "from commvlm import CommConfig"),
        ("microworld/scene.py", "from ..evaluate import run"),
        ("probe/run.py", "from ..microworld.readout import micro_problem"),
        ("probe/advise.py", "from ..train.recipe import Recipe"),
        ("train/run.py", "from ..microworld.writer import write_world"),
        ("train/run.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..app.chat import chat"),
        ("app/chat.py", "from ..cli import main"),
        ("app/chat.py", "from .. import cli"),
        ("__init__.py", "from .train import recipe"),
        ("helpers/text.py", "x = 1"),
    ],
)
def test_a_forbidden_arrow_is_found(tmp_path, allowed, file, line):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"from __future__ import annotations\n{line}\n")
    assert len(faults(tmp_path, allowed)) == 1
    assert faults(tmp_path, allowed)[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model/merge.py", "from .names import settle"),
        ("data/readers/pope.py", "from ..example import Example"),
        ("evaluate/tasks/rec.py", "from commvlm.data.boxes import PadSquare"),
        ("train/run.py", "from ..evaluate.run import predict"),
        ("app/chat.py", "from ..microworld.writer import write_world"),
        ("cli/chat.py", "from ..app.chat import chat"),
        ("__init__.py", "from .model import CommConfig"),
    ],
)
def test_an_allowed_arrow_is_not(tmp_path, allowed, file, line):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{line}\n")
    assert faults(tmp_path, allowed) == []
