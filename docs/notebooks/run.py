"""Runs notebooks as they are and keeps what they show, warnings and progress bars apart: python run.py FILE.ipynb ..."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(book, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if not _idle(one)]
    nbformat.write(book, path)


def _idle(output: Any) -> bool:
    """Whether it is a warning or what is left of a progress bar."""
    shown = str(output.get("data", {}).get("text/plain", "something"))
    return output.get("name") == "stderr" or not shown.strip() or "ipywidgets" in shown


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
