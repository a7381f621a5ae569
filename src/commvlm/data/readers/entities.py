"""Flickr30k Entities: captions whose phrases are chains of boxes, for captions that say where everything is.

Sentences/ID.txt:    five lines, `[/EN#1/people Two young guys] with ...`; chain 0 is not visual
Annotations/ID.xml:  size, object {name (a chain; several may share a box), bndbox {xmin, ymin, xmax, ymax} | nobndbox}
train.txt, ...:      ids of a split, one a line

Its coordinates count pixels from 1; 1 is taken off each, as the set's own parsers do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from ..example import BOXES, RESERVED, Box, Example, Turn
from .entry import EntryError, Read
from .files import image_folder, read_rows

_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s\]]+)*)\s+([^\]]*)\]")


def read_entities(*, images: Path, sentences: Path, annotations: Path, split: Path) -> Read:
    """One example a sentence: its text with `<boxes>` behind every phrase that has boxes. Task "spotting".

    sentences, annotations: the two folders. split: the file of ids. A chain's boxes go into one slot, in the file's order.
    facts: image_id, sentence (from 0), width, height.
    """
    folder = image_folder(images)
    for place in (sentences, annotations):
        if not place.is_dir():
            raise ValueError(f"{place}: there is no such folder of Flickr30k Entities")
    for key in read_rows(split):
        try:
            examples = list(_image(key, folder, sentences, annotations))
        except EntryError as error:
            yield error
        else:
            yield from examples


def _image(key: str, folder: Path, sentences: Path, annotations: Path) -> Iterator[Example]:
    if not re.fullmatch(r"\w+", key):
        raise EntryError(f"image {key!r}", "is no id of Flickr30k")
    chains, size = _chains(annotations / f"{key}.xml")
    try:
        rows = read_rows(sentences / f"{key}.txt")
    except ValueError as error:
        raise EntryError(f"image {key}:", str(error)) from error
    for number, row in enumerate(rows):
        if any(slot in row for slot in RESERVED):
            raise EntryError(f"{key}.txt:{number + 1}:", "has a reserved slot in its text")
        text, groups = _spotted(row, chains)
        yield Example(
            f"{key}:{number}", "spotting", folder / f"{key}.jpg", (Turn("", text, answer_boxes=groups),),
            references=(_PHRASE.sub(r"\3", row),), facts={"image_id": key, "sentence": number, **size},
        )  # fmt: skip


def _spotted(row: str, chains: dict[str, list[Box]]) -> tuple[str, tuple[tuple[Box, ...], ...]]:
    """The sentence with a slot behind every phrase that has boxes, and their boxes."""
    groups: list[tuple[Box, ...]] = []

    def phrase(match: re.Match[str]) -> str:
        boxes = chains.get(match[1], [])
        if not boxes:
            return match[3]
        groups.append(tuple(boxes))
        return f"{match[3]} {BOXES}"

    return _PHRASE.sub(phrase, row), tuple(groups)


def _chains(path: Path) -> tuple[dict[str, list[Box]], dict[str, int]]:
    """chain -> its boxes, and the image's size."""
    where = f"{path.name}:"
    if not path.is_file():
        raise EntryError(where, f"there is no such annotation in {path.parent}")
    text = path.read_bytes()
    if b"<!" in text:  # a document type can hold entities that unfold without end; these files have none
        raise EntryError(where, "declares a document type, which these files do not")
    try:
        root = ElementTree.fromstring(text)
        size = {name: int(root.findtext(f"size/{name}") or "") for name in ("width", "height")}
        chains: dict[str, list[Box]] = {}
        for item in root.iter("object"):
            if (bounds := item.find("bndbox")) is None:
                continue
            corners = [float(bounds.findtext(side) or "") - 1 for side in ("xmin", "ymin", "xmax", "ymax")]
            x1, y1, x2, y2 = corners
            if not (x1 < x2 and y1 < y2):
                raise EntryError(where, f"has a box {corners} that is empty or turned inside out")
            for name in item.findall("name"):
                chains.setdefault((name.text or "").strip(), []).append((x1, y1, x2, y2))
    except (ElementTree.ParseError, ValueError) as error:
        if isinstance(error, EntryError):
            raise
        raise EntryError(where, f"is no annotation of Flickr30k Entities ({error})") from error
    return chains, size
