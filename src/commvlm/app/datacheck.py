"""The page and the table of `commvlm data check`: every source, its problems, and pictures with their boxes drawn."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ..data.check import PROBLEMS, SourceCheck
from ..data.example import BOXES, POINTS, Example
from ..data.images import open_image
from ..train.checking import Checked
from .drawing import ASKED, TRUE, Mark, draw_boxes

PICTURES = 4
"""Pictures drawn of every source."""
WIDTH = 480
"""Pixels of a drawn picture's longer side on the page."""


def write_check(found: Sequence[Checked], out: Path, *, recipe: str) -> Path:
    """Writes OUT/check.json and OUT/check.html, each whole; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [item.check.as_json() for item in found]
    _write(out / "check.json", json.dumps({"recipe": recipe, "sources": rows}, indent=1, ensure_ascii=False))
    template = (resources.files("commvlm") / "app" / "datacheck.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    page = environment.from_string(template).render(
        recipe=recipe,
        problems=PROBLEMS,
        shown=_shown([item.check for item in found]),
        sources=[(item.check, _pictures(item.examples)) for item in found],
    )
    _write(out / "check.html", page)
    return out / "check.html"


def print_check(checks: Sequence[SourceCheck]) -> None:
    """A table on stdout, and under it the first places of every problem."""
    table = Table(box=None, header_style="bold")
    shown = _shown(checks)
    for column in ("source", "for", "format"):
        table.add_column(column, no_wrap=column != "format")
    for column in ("examples", "images", "boxes", *shown):
        table.add_column(column, justify="right")
    for check in checks:
        counts = [f"{check.problems[name].count:,}" if check.problems[name].count else "-" for name in shown]
        table.add_row(
            check.name,
            check.role,
            check.format,
            f"{check.examples:,}",
            f"{check.images:,}",
            f"{check.boxes:,}",
            *counts,
        )
    console = Console(width=max(140, Console().width), highlight=False)  # a table that is cut says nothing
    console.print(table)
    for check in checks:
        for said in filter(None, (check.error, check.note, check.convention)):
            console.print(f"{check.name}: {said}", markup=False, soft_wrap=True)
        if check.held:
            said = "examples about images that data.held_out names, which are not trained on"
            console.print(f"{check.name}: {check.held:,} {said}", markup=False, soft_wrap=True)
        for name, problem in check.problems.items():
            if problem.count:
                console.print(f"{check.name}: {problem.count:,} {PROBLEMS[name]}", markup=False, soft_wrap=True)
            for place in problem.places:
                console.print(f"    {place}", markup=False, soft_wrap=True)


def _shown(checks: Sequence[SourceCheck]) -> list[str]:
    """The problems that any source has."""
    return [name for name in PROBLEMS if any(check.problems[name].count for check in checks)]


def _pictures(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """A seeded few of the source's examples, drawn."""
    if not len(examples):
        return []
    places = np.random.default_rng(0).permutation(len(examples))[: 4 * PICTURES]
    drawn = []
    for place in places.tolist():
        example = examples[place]
        picture = None if example.image is None else _drawn(example)
        if picture is None and example.image is not None:
            continue
        drawn.append({"id": example.id, "task": example.task, "image": picture, "turns": _texts(example)})
        if len(drawn) == PICTURES:
            break
    return drawn


def _drawn(example: Example) -> str | None:
    """The picture with its boxes and points as a data URL; None where it cannot be opened."""
    assert example.image is not None
    try:
        image = open_image(example.image)
    except ValueError:
        return None
    factor = WIDTH / max(image.size)
    small = image.resize([max(1, round(side * factor)) for side in image.size])
    marks, dots = [], []
    for turn in example.turns:
        for color, groups, points in (
            (ASKED, turn.question_boxes, turn.question_points),
            (TRUE, turn.answer_boxes, turn.answer_points),
        ):
            for number, group in enumerate(groups, start=1):
                label = str(number) if len(groups) > 1 else ""
                for x1, y1, x2, y2 in group:
                    marks.append(Mark((x1 * factor, y1 * factor, x2 * factor, y2 * factor), color, label))
            dots += [(x * factor, y * factor, color) for group in points for x, y in group]
    picture = draw_boxes(small, marks, shortest=1)
    pen = ImageDraw.Draw(picture)
    for x, y, color in dots:
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=color, outline="black", width=2)
    return _data_url(picture)


def _data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.convert("RGB").save(content, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _texts(example: Example) -> list[tuple[str, str]]:
    """Questions and answers with their slots numbered as the boxes are."""
    return [(_numbered(turn.question), _numbered(turn.answer)) for turn in example.turns[:3]]


def _numbered(text: str) -> str:
    for slot in (BOXES, POINTS):
        pieces = text.split(slot)
        many = len(pieces) > 2
        text = pieces[0] + "".join(
            f"[{slot[1:-1]}{f' {k}' if many else ''}]{piece}" for k, piece in enumerate(pieces[1:], start=1)
        )
    return text


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
