"""Captions of COCO and Flickr30k: references in COCO's format, results as [{"image_id", "caption"}]."""

from __future__ import annotations

from pathlib import Path

from commvlm.data.readers.entry import Entry
from commvlm.data.readers.files import read_object

from ..tasks import CAPTION, Record
from .result import Official, by_id, check_same_ids, rows

ID = "image_id"


def score_caption(references: Path, predictions: Path, *, rule: str = "ptb", subset: bool = False) -> Official:
    """Figures: cider (the official scale, 0 to 10), bleu4, rouge_l in [0, 1], n images.

    BLEU and ROUGE-L come with the rule ptb, the official tokenizer, and are None without. subset: only the images that have
    a prediction are scored, as the official example does; CIDEr's document frequencies are then theirs alone.
    Raises ValueError naming file, place and image_id for what cannot be paired or read.
    """
    file = read_object(references)
    known = {str(entry.key("id")) for entry in file.entries("images", "image")} if file.has("images") else None
    truths: dict[str, list[str]] = {}
    for entry in file.entries("annotations", "annotation"):
        key = str(entry.key(ID))
        if known is not None and key not in known:
            raise entry.error(f"has image_id {key}, which is not among the file's images")
        truths.setdefault(key, []).append(entry.text("caption"))
    said = by_id(rows(predictions), _caption, id=ID)
    wanted = {key: truths[key] for key in truths if key in said} if subset else truths
    check_same_ids(wanted, said, what=ID, names=(references.name, predictions.name))
    score = CAPTION.score([_record(key, wanted[key], said[key]) for key in wanted], rule=rule)
    return Official(
        score,
        sentence_figures(score.value, score.extra, score.n),
        {"references": references, "predictions": predictions},
    )


def sentence_figures(value: float, extra: object, n: int) -> dict[str, object]:
    """A score's figures in the official units."""
    assert isinstance(extra, dict)
    found = {name: extra[name] / 100 if name in extra else None for name in ("bleu4", "rouge_l")}
    return {"cider": value / 100, **found, "n": n}


def _caption(entry: Entry) -> str:
    return entry.string("caption")


def _record(key: str, references: list[str], text: str) -> Record:
    return Record(
        id=key, task="caption", image=key, width=None, height=None, question="", text=text,
        parsed=CAPTION.parse(text, None, {}), answer=references[0], references=tuple(references),
    )  # fmt: skip
