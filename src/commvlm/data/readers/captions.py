"""COCO captions: {"images": [{id, file_name, ...}], "annotations": [{id, image_id, caption}]}."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..example import Example, Turn
from .entry import Entry, EntryError, Read
from .files import image_folder, read_object

Facts = dict[str, str | int | float]


def read_coco_captions(*, images: Path, annotations: Path, per: Literal["caption", "image"] = "caption") -> Read:
    """per = "caption" (training): one example a caption. "image" (evaluation): one an image, its captions as references
    and the first as the answer. An image without captions gives no example."""
    if per not in ("caption", "image"):
        raise ValueError(f"coco-captions: per is {per!r}, it must be caption or image")
    folder, file = image_folder(images), read_object(annotations)
    known: dict[str | int, tuple[Path, Facts]] = {}
    for entry in file.each("images", "image"):
        try:
            key, shown = _image(entry, folder)
            if key in known:
                raise entry.error(f"has id {key!r} a second time")  # type: ignore[union-attr]
            known[key] = shown
        except EntryError as error:
            yield error
    captions: dict[str | int, list[str]] = {key: [] for key in known}
    for entry in file.each("annotations", "annotation"):
        try:
            key, text = _caption(entry, known)
            captions[key].append(text)
        except EntryError as error:
            yield error
    for key, texts in captions.items():
        image, facts = known[key]
        if per == "caption":
            for number, text in enumerate(texts):
                yield Example(f"{key}:{number}", "caption", image, (Turn("", text),), facts=facts)
        elif texts:
            yield Example(str(key), "caption", image, (Turn("", texts[0]),), references=tuple(texts), facts=facts)


def _image(entry: Entry | EntryError, folder: Path) -> tuple[str | int, tuple[Path, Facts]]:
    if isinstance(entry, EntryError):
        raise entry
    key = entry.key("id")
    return key, (entry.image(folder, entry.text("file_name")), {"image_id": key, **entry.size()})


def _caption(entry: Entry | EntryError, known: dict[str | int, tuple[Path, Facts]]) -> tuple[str | int, str]:
    """Captions of COCO carry stray blanks and line breaks at their ends; they are no part of the answer."""
    if isinstance(entry, EntryError):
        raise entry
    key = entry.key("image_id")
    if key not in known:
        raise entry.error(f"has image_id {key!r}, which is not among the file's images")
    return key, entry.plain("caption").strip()
