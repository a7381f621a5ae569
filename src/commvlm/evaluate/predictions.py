"""predictions.jsonl: one JSON object per example, written before anything is scored.

While answers are still missing the file is called predictions.jsonl.partial. Lines are only ever appended to it; a line
that a kill cut off is dropped when the run goes on. Complete, it gets its name. So a file of that name is never half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from commvlm.data.example import Box
from commvlm.data.readers.entry import short

from .tasks import Record, task_named
from .tasks.task import LARGEST, Size

_TEXTS = ("id", "task", "question", "text", "answer")
_FIELDS = frozenset((*_TEXTS, "image", "width", "height", "parsed", "boxes", "asked_boxes", "references", "facts"))


def partial_path(path: Path) -> Path:
    """Where the predictions of an unfinished run are."""
    return path.with_name(path.name + ".partial")


def append_records(file: BinaryIO, records: Sequence[Record]) -> None:
    """The records as whole lines, on the disk when this returns."""
    lines = (json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) for record in records)
    file.write("".join(f"{line}\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())


def drop_torn_line(path: Path) -> None:
    """Cuts off what a kill left of a last line: whole lines end in a line break."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def read_predictions(path: Path | str) -> list[Record]:
    """The records in the file's order, their answers read anew by their task's parse.

    So a file scores by today's rules, whatever the program that wrote it read in the answers.
    Raises FileNotFoundError when there is none; ValueError, with the line's number, for a line that is no record, and
    for a second prediction of one example.
    """
    path = Path(path)
    if not path.exists() and partial_path(path).exists():
        raise FileNotFoundError(f"{path} is not complete yet: go on with the run that writes {partial_path(path).name}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of predictions at {path}: predict first")
    return [record for record, _ in _read(path, path.read_bytes())]


def read_unfinished(path: Path) -> list[tuple[Record, bytes]]:
    """Records and their lines of a file that may be growing: its last line counts only with its line break.

    Raises as `read_predictions`.
    """
    content = path.read_bytes()
    return _read(path, content[: content.rfind(b"\n") + 1])


def _read(path: Path, content: bytes) -> list[tuple[Record, bytes]]:
    found: list[tuple[Record, bytes]] = []
    places: dict[tuple[str, str], int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
        first = places.setdefault((record.task, record.id), number)
        if first != number:
            raise ValueError(f"{path} line {number}: a second prediction for {record.name}, line {first} holds one")
        found.append((record, line))
    return found


def _record(line: bytes) -> Record:
    """Raises ValueError when the line is no JSON object, lacks a field, has one too many, or one of a wrong kind."""
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a line of JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"a prediction is a JSON object, this is a {type(values).__name__}")
    missing, odd = sorted(_FIELDS - set(values)), sorted(set(values) - _FIELDS)
    if missing or odd:
        fault = f"lacks {', '.join(missing)}" if missing else f"has an unknown {', '.join(odd)}"
        raise ValueError(f"a prediction {fault}; predict writes exactly {', '.join(sorted(_FIELDS))}")
    wrong = next((name for name in _TEXTS if not isinstance(values[name], str)), None)
    if wrong:
        raise ValueError(f"{wrong} must be a text, it is {values[wrong]!r}")
    size, facts = _size(values), _facts(values["facts"])
    return Record(
        id=values["id"],
        task=values["task"],
        image=_image(values["image"]),
        width=None if size is None else size[0],
        height=None if size is None else size[1],
        question=values["question"],
        text=values["text"],
        parsed=task_named(values["task"]).parse(values["text"], size, facts),
        answer=values["answer"],
        boxes=_boxes(values["boxes"], "boxes"),
        asked_boxes=_boxes(values["asked_boxes"], "asked_boxes"),
        references=_references(values["references"]),
        facts=facts,
    )


def _image(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"image must be a path or null, it is {value!r}")


def _size(values: Mapping[str, Any]) -> Size | None:
    size: Any = values["width"], values["height"]
    if size == (None, None):
        return None
    if all(type(side) is int and 0 < side < LARGEST for side in size):
        return size
    raise ValueError(f"width and height must be whole numbers above 0 and below {LARGEST:,}, they are {short(size)}")


def _boxes(value: Any, name: str) -> tuple[Box, ...]:
    if not isinstance(value, list) or not all(_is_box(box) for box in value):
        raise ValueError(
            f"{name} must be a list of boxes [x1, y1, x2, y2] in pixels, below {LARGEST:,}, it is {short(value)}"
        )
    return tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in value)


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(type(corner) in (int, float) and abs(corner) < LARGEST for corner in value)
    )


def _references(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"references must be a list of texts, it is {value!r}")
    return tuple(value)


def _facts(value: Any) -> dict[str, str | int | float]:
    if not isinstance(value, dict) or not all(isinstance(fact, str | int | float) for fact in value.values()):
        raise ValueError(f"facts must be an object of texts and numbers, it is {value!r}")
    return dict(value)
