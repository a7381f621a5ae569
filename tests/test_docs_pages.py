"""What the docs tell people to type is typed: every file and command of docs/extend.md, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from commvlm.cli import whole_parser

DOCS = Path(__file__).resolve().parents[1] / "docs"
FILES = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
COMMANDS = re.compile(r"^    ((?:python|commvlm) .*)$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_on_extending_runs_as_it_stands(tmp_path):
    page = (DOCS / "extend.md").read_text(encoding="utf-8")
    for name, text in FILES.findall(page):
        (tmp_path / name).write_text(text)
    commands = COMMANDS.findall(page)
    assert len(commands) == 9
    shown = {}
    for command in commands:
        typed = re.sub(r"^python", sys.executable, re.sub(r"^commvlm", f"{sys.executable} -m commvlm.cli", command))
        done = subprocess.run(
            typed, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout[-500:], done.stderr[-2000:])
        shown[command] = done.stdout
    assert "ijepa" in shown["python encoder_ijepa.py inspect ijepa.yaml"]
    assert re.search(r"color \| accuracy \(exact\) \| 4\d", [*shown.values()][-1])
    assert (tmp_path / "untrained" / "receipts" / "color.json").is_file()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_commands_in_the_docs_exist_with_their_options(page):
    """Every `commvlm WORD ...` of a page is a command, and every option of it, too (keys of a recipe apart)."""
    commands = next(action for action in whole_parser()._actions if isinstance(action.choices, dict))
    for line in re.findall(r"^    commvlm (.+?)(?: +#.*|  .*)?$", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = line.split()
        chosen = commands.choices.get(words[0])
        assert chosen is not None or words[0].startswith("-") or words[0].isupper(), line
        below = "".join(one.format_help() for one in _all_below(chosen)) if chosen else ""
        for option in re.findall(r"(?<= )--[a-z-]+(?![\w.-])", line) if chosen else ():
            assert option in below, (line, option)


def test_the_page_of_commands_has_every_option(monkeypatch):
    """As mkdocs makes it; its extension for docstrings is not needed for that."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(str(DOCS))
    import hooks

    page = (DOCS / hooks.COMMANDS).read_text(encoding="utf-8")
    made = hooks.on_page_markdown(page, page=SimpleNamespace(file=SimpleNamespace(src_uri=hooks.COMMANDS)))
    every = [one for one in _all_below(whole_parser()) if not any(isinstance(a.choices, dict) for a in one._actions)]
    assert len(every) > 30
    for one in every:
        section = made.split(f"## {one.prog}\n")[1].split("\n## ")[0]
        for option in (word for action in one._actions for word in action.option_strings):
            assert option in section, (one.prog, option)


def _all_below(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for one in action.choices.values():
                yield from _all_below(one)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(path.name for path in (DOCS / "notebooks").glob("*.ipynb")))
def test_a_notebook_runs_at_a_small_size(name, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs: pip install 'commvlm[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs: pip install 'commvlm[docs]'")
    pytest.importorskip("ipykernel", reason="needs the extra docs: pip install 'commvlm[docs]'")
    book = nbformat.read(DOCS / "notebooks" / name, as_version=4)
    for cell in book.cells:
        cell.source = re.sub(r"^SCALE = 1\.0$", "SCALE = 0.005", cell.source, flags=re.MULTILINE)
        cell.source = cell.source.replace("[:200]", "[:3]").replace("count=40", "count=2")
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
