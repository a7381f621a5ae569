"""REC and REG against referring expressions.

References: Shikra's JSON lines {"img_path", "expression", "bbox", "width", "height"}; refer's own refs(unc).p or refs(umd).p
with a split and, for REC, its instances.json; or, for REG, the same objects as JSON [{"ref_id", "sentences": [{"sent"}]}].
A line's id is its own "id", or else its number, from 1; refer's sentences have their "sent_id". An object's is its "ref_id",
or else the id of its first line.

Predictions, as JSON lines, one list, or refer's {"predictions": [...]}:
REC {"id", "box": [x1, y1, x2, y2]} in pixels of the original image, or {"id", "answer": "... [x1,y1,x2,y2] ..."} in Shikra's
text; REG {"ref_id" (or "id"), "sent"}, as in refer's test/sample_expressions_*.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from commvlm.data.example import Box, Example
from commvlm.data.readers import read
from commvlm.data.readers.entry import Entry, short
from commvlm.data.readers.files import read_json, read_pickle

from ..metrics.rec import PLACES
from ..tasks import REC, REG, Record
from ..tasks.rec import BOX_CODEC
from ..tasks.task import LARGEST, Size
from .caption import sentence_figures
from .result import Official, by_id, check_same_ids, listed, rows

PICKLE = ".p"
Object = tuple[str, tuple[Box, ...], tuple[str, ...]]
"""Image, box (none where the file gives none), expressions."""


def score_rec(
    references: Path,
    predictions: Path,
    *,
    rule: str = "standard",
    split: str | None = None,
    instances: Path | None = None,
) -> Official:
    """Figures: accuracy in [0, 1], mean_iou, n, unparsable (answers without exactly one box; they count as wrong).

    Raises ValueError naming file, place and id for what cannot be paired or read.
    """
    pickled = references.suffix == PICKLE
    asked = _sentences(references, instances, split) if pickled else _lines(references)
    said = by_id(rows(predictions), _said_box, id="id", prefix=_prefix(references))
    check_same_ids(asked, said, what="id", names=(references.name, predictions.name))
    score = REC.score([_answered(record, *said[key]) for key, record in asked.items()], rule=rule)
    figures = {
        "accuracy": sum(score.marks.values()) / score.n, "mean_iou": float(str(score.extra["mean_iou"])) / 100,
        "n": score.n, "unparsable": score.unparsable,
    }  # fmt: skip
    read = {"references": references, "predictions": predictions}
    return Official(score, figures, read if instances is None else {**read, "instances": instances})


def score_reg(references: Path, predictions: Path, *, rule: str = "ptb", split: str | None = None) -> Official:
    """Figures: cider per object (the official scale, 0 to 10), bleu4, rouge_l, n objects.

    The same expression given twice for an object counts once, as in refer's own samples; two different ones are an error.
    Raises ValueError naming file, place and id for what cannot be paired or read.
    """
    objects = _refs(references, split) if references.suffix == PICKLE else _objects(references)
    entries = _predictions(predictions)
    id = "ref_id" if entries and entries[0].has("ref_id") else "id"
    said = by_id(entries, lambda entry: entry.string("sent"), id=id, repeats=True, prefix=_prefix(references))
    check_same_ids(objects, said, what=id, names=(references.name, predictions.name))
    score = REG.score([_reg_record(key, *objects[key], said[key]) for key in objects], rule=rule)
    files = {"references": references, "predictions": predictions}
    return Official(score, sentence_figures(score.value, score.extra, score.n), files)


def _numbered(path: Path) -> list[tuple[str, Entry]]:
    """Every line under its id. Raises ValueError for an id that comes twice."""
    found: dict[str, Entry] = {}
    for number, entry in enumerate(rows(path), start=1):
        key = str(entry.key("id")) if entry.has("id") else str(number)
        if found.setdefault(key, entry) is not entry:
            raise entry.error(f"has id {key} a second time")
    return list(found.items())


def _prefix(references: Path) -> str:
    """Of ids that name their file as well, as the reader's do: "REC_val:12" is line 12 of REC_val.jsonl."""
    return f"{references.stem}:"


def _predictions(path: Path) -> list[Entry]:
    """Rows, or the list under "predictions" of one object."""
    if (
        path.is_file()
        and path.suffix == ".json"
        and isinstance(value := read_json(path), dict)
        and "predictions" in value
    ):
        return listed(value["predictions"], path)
    return rows(path)


def _objects(path: Path) -> dict[str, Object]:
    entries = rows(path)
    if entries[0].has("sentences"):
        return by_id(entries, _ref, id="ref_id")
    found: dict[object, tuple[str, str, Box, list[str]]] = {}
    for key, entry in _numbered(path):
        image, box = entry.text("img_path"), _box(entry, "bbox")
        ref = str(entry.key("ref_id")) if entry.has("ref_id") else None
        *_, expressions = found.setdefault(ref or (image, box), (ref or key, image, box, []))
        expressions.append(entry.text("expression"))
    return {key: (image, (box,), tuple(said)) for key, image, box, said in found.values()}


def _ref(entry: Entry) -> Object:
    sentences = tuple(sentence.string("sent") for sentence in entry.entries("sentences", "sentence"))
    return str(entry.key("image_id")) if entry.has("image_id") else "", (), sentences


def _said_box(entry: Entry) -> tuple[str, bool]:
    """The text that holds the box, and whether it is in pixels."""
    if entry.has("answer"):
        return entry.string("answer"), False
    box = _box(entry, "bbox" if entry.has("bbox") and not entry.has("box") else "box")
    return f"[{','.join(np.format_float_positional(value, precision=PLACES) for value in box)}]", True


def _box(entry: Entry, field: str) -> Box:
    values = entry.numbers(field)
    if len(values) != 4 or not all(abs(value) < LARGEST for value in values):
        raise entry.error(
            f"has {field} {values}, it must be x1, y1, x2, y2 in pixels, all finite and below {LARGEST:,}"
        )
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2


def _lines(path: Path) -> dict[str, Record]:
    return {key: _asked(key, entry) for key, entry in _numbered(path)}


def _size(said: Mapping[str, object], where: str) -> Size:
    """The image's width and height. Raises ValueError, naming where it is said, for what is no size."""
    size: Any = said.get("width"), said.get("height")
    if not all(type(side) is int and 0 < side < LARGEST for side in size):
        raise ValueError(
            f"{where} has width and height {short(size)}; REC needs both, in whole pixels below {LARGEST:,}"
        )
    return size


def _asked(key: str, entry: Entry) -> Record:
    width, height = _size(entry.value, entry.where)
    return Record(
        id=key, task="rec", image=entry.text("img_path"), width=width, height=height,
        question=entry.text("expression"), text="", parsed=None, answer="", boxes=(_box(entry, "bbox"),),
    )  # fmt: skip


def _sentences(path: Path, instances: Path | None, split: str | None) -> dict[str, Record]:
    """Every sentence of refer's split, by its sent_id."""
    if instances is None or split is None:
        raise ValueError(f"{path.name} says no boxes: add --instances instances.json and --split, such as testA")
    examples = read("refer", images=path.parent, refs=path, instances=instances, split=split)
    return {example.id: _shown(example, instances) for example in examples}


def _shown(example: Example, instances: Path) -> Record:
    width, height = _size(example.facts, f"{instances.name}: image {example.facts['image_id']}")
    return Record(
        id=example.id, task="rec", image=str(example.facts["image_id"]), width=width, height=height,
        question=example.turns[0].question, text="", parsed=None, answer="", boxes=example.turns[0].boxes,
    )  # fmt: skip


def _refs(path: Path, split: str | None) -> dict[str, Object]:
    """refer's objects of a split; of all where none is given."""
    entries = listed(read_pickle(path), path)
    wanted = [entry for entry in entries if split is None or entry.text("split") == split]
    if not wanted:
        known = ", ".join(sorted({entry.text("split") for entry in entries}))
        raise ValueError(f"{path.name}: has no object of split {split!r}; it has {known}")
    return by_id(wanted, _ref, id="ref_id")


def _answered(record: Record, text: str, pixels: bool) -> Record:
    return replace(record, text=text, facts={BOX_CODEC: "pixels"} if pixels else {})


def _reg_record(key: str, image: str, boxes: tuple[Box, ...], expressions: tuple[str, ...], text: str) -> Record:
    return Record(
        id=key, task="reg", image=image or f"ref {key}", width=None, height=None, question="", text=text,
        parsed=REG.parse(text, None, {}), answer=expressions[0], asked_boxes=boxes, references=expressions,
        facts={"ref_id": key},
    )  # fmt: skip
