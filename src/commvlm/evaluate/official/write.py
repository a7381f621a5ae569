"""Answers as the official result files, for the official tools, for EvalAI and for `commvlm score`.

    FOLDER/pope_{set}.jsonl    {"question_id", "answer"}
    FOLDER/vqa.json            [{"question_id", "answer"}]
    FOLDER/caption.json        [{"image_id", "caption"}]
    FOLDER/mme/{subtask}.txt   image<TAB>question<TAB>label<TAB>answer
    FOLDER/rec.jsonl           {"id", "answer"}, or {"id", "box"} in pixels where answers are not in Shikra's text
    FOLDER/reg.json            [{"ref_id" or "id", "sent"}]

Sets of one task are files of their own: FOLDER/rec.refcoco-val.jsonl.
Wrappers are taken off as for scoring. PointQA and Visual7W have no official format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from commvlm.data.example import IMAGE

from ..metrics import SUBTASKS
from ..tasks import Record, task_named
from ..tasks.rec import BOX_CODEC, GEOMETRY

Row = dict[str, object]
_SET = re.compile(r"(?!\.+$)[\w+.-]+")
"""What a set may be called: its name becomes a part of its file's."""


def write_official(records: Sequence[Record], folder: Path, *, name: str = "") -> list[Path]:
    """Files of one task's records, each whole or not there; returns their paths. name: of the files, the task's by default.

    None where the task has no official format, or where its reader gives no official ids. Raises ValueError naming a record
    of a set or subtask that can be no part of a file's name.
    """
    task = records[0].task
    if task not in NEEDS or not all(fact in record.facts for record in records for fact in NEEDS[task]):
        return []
    name = name or task
    if task == "mme":
        return _write_mme(records, folder / name)
    groups: dict[str, list[Row]] = {}
    for record in records:
        groups.setdefault(_part(record), []).append(ROWS[task](record, task_named(task).bare(record.text)))
    as_lines = task in ("pope", "rec")
    written = []
    for part, rows in groups.items():
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        text = lines if as_lines else json.dumps(rows, ensure_ascii=False)
        written.append(_write(folder / f"{name}{part}.{'jsonl' if as_lines else 'json'}", text))
    return written


def _part(record: Record) -> str:
    """What the record's set adds to the file's name."""
    if "set" not in record.facts:
        return ""
    name = str(record.facts["set"])
    if not _SET.fullmatch(name):
        raise ValueError(f"{record.name}: set {name!r} becomes a file's name; use letters, digits and . _ + - only")
    return f"_{name}"


def _expression(record: Record, text: str) -> Row:
    known = {"ref_id": record.facts["ref_id"]} if "ref_id" in record.facts else {"id": record.id}
    return {**known, "sent": text.strip()}


def _box(record: Record, text: str) -> Row:
    """The text; where it is written in another way than Shikra's the box that it says, or a blank answer."""
    if not {BOX_CODEC, GEOMETRY} & record.facts.keys():
        return {"id": record.id, "answer": text}
    said = {"answer": ""} if record.parsed is None else {"box": record.parsed}
    return {"id": record.id, **said}


ROWS: dict[str, Callable[[Record, str], Row]] = {
    "pope": lambda record, text: {"question_id": record.facts["question_id"], "answer": text},
    "vqa": lambda record, text: {"question_id": record.facts["question_id"], "answer": text.strip()},
    "caption": lambda record, text: {"image_id": record.facts["image_id"], "caption": text.strip()},
    "rec": _box,
    "reg": _expression,
}
NEEDS = {
    "pope": ("question_id",), "vqa": ("question_id",), "caption": ("image_id",), "rec": (), "reg": (),
    "mme": ("image_name", "question_number", "subtask"),
}  # fmt: skip
"""Facts without which a task's records have no place in its official format."""


def _write_mme(records: Sequence[Record], folder: Path) -> list[Path]:
    """The two questions of an image one after the other, as the official script takes them."""
    lines: dict[str, list[tuple[str, int, str]]] = {}
    for record in records:
        subtask = str(record.facts["subtask"])
        if subtask not in SUBTASKS:
            raise ValueError(f"{record.name}: subtask {subtask!r} is none of MME's: {', '.join(SUBTASKS)}")
        image, number = str(record.facts["image_name"]), int(record.facts["question_number"])
        said = " ".join(task_named("mme").bare(record.text).split())
        question = record.question.replace(f"{IMAGE}\n", "")
        line = "\t".join((image, question, record.answer, said))
        lines.setdefault(subtask, []).append((image, number, line))
    return [
        _write(folder / f"{name}.txt", "".join(f"{line}\n" for *_, line in sorted(found)))
        for name, found in lines.items()
    ]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path
