"""COCO captions: {"images": [{id, file_name, ...}], "annotations": [{id, image_id, caption}]}."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..example import BOXES, Example, Turn
from .files import Entry, image_folder, read_object

Facts = dict[str, str | int | float]


def read_coco_captions(
    *, images: Path, annotations: Path, per: Literal["caption", "image"] = "caption"
) -> list[Example]:
    """per = "caption" (training): one example a caption. "image" (evaluation): one an image, its captions as references
    and the first as the answer. An image without captions gives no example. Raises ValueError naming file and entry."""
    if per not in ("caption", "image"):
        raise ValueError(f"coco-captions: per is {per!r}, it must be caption or image")
    folder, file = image_folder(images), read_object(annotations)
    known = _images(file, folder)
    captions: dict[str | int, list[str]] = {key: [] for key in known}
    for entry in file.entries("annotations", "annotation"):
        key = entry.key("image_id")
        if key not in known:
            raise entry.error(f"has image_id {key!r}, which is not among the file's images")
        captions[key].append(_caption(entry))
    if per == "caption":
        return [
            Example(f"{key}:{number}", "caption", *_shown(known[key], text), facts=known[key][1])
            for key, texts in captions.items()
            for number, text in enumerate(texts)
        ]
    return [
        Example(str(key), "caption", *_shown(known[key], texts[0]), references=tuple(texts), facts=known[key][1])
        for key, texts in captions.items()
        if texts
    ]


def _shown(known: tuple[Path, Facts], text: str) -> tuple[Path, tuple[Turn, ...]]:
    return known[0], (Turn("", text),)


def _images(file: Entry, folder: Path) -> dict[str | int, tuple[Path, Facts]]:
    known: dict[str | int, tuple[Path, Facts]] = {}
    for entry in file.entries("images", "image"):
        key = entry.key("id")
        if key in known:
            raise entry.error(f"has id {key!r} a second time")
        facts: Facts = {"image_id": key}
        if entry.has("width") or entry.has("height"):
            facts["width"], facts["height"] = entry.integer("width"), entry.integer("height")
        known[key] = entry.image(folder, entry.text("file_name")), facts
    return known


def _caption(entry: Entry) -> str:
    """Captions of COCO carry stray blanks and line breaks at their ends; they are no part of the answer."""
    text = entry.text("caption").strip()
    if BOXES in text:
        raise entry.error(f"has {BOXES} in its caption, which is reserved")
    return text
