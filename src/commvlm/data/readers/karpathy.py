"""Karpathy's splits of COCO and Flickr30k, for captions.

{"images": [{filename, filepath (COCO), split, imgid, cocoid (COCO), sentids, sentences: [{raw, tokens, sentid}]}],
 "dataset": "coco" | "flickr30k"}

The captions are the sentences' `raw`: `tokens` have lost their punctuation, which the metric's own tokenizer handles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..example import Example, Turn
from .entry import Entry, EntryError, Read, made
from .files import image_folder, read_object

SPLITS = ("train", "val", "test", "restval", "train+restval")


def read_karpathy(*, images: Path, annotations: Path, split: str, per: Literal["caption", "image"] = "image") -> Read:
    """per = "image" (evaluation): one example an image, its captions as references. "caption" (training): one a caption.

    split "train+restval" is what COCO's captioners train on. COCO's images are looked for in their `filepath`
    (train2014, val2014) under `images`, or directly in it where there is no such folder.
    """
    if split not in SPLITS or per not in ("caption", "image"):
        raise ValueError(f"karpathy: split {split!r} per {per!r}; splits: {', '.join(SPLITS)}; per caption or image")
    folder, wanted = image_folder(images), split.split("+")
    entries = read_object(annotations).each("images", "image")
    chosen = (e for e in entries if isinstance(e, EntryError) or e.value.get("split") in wanted)
    yield from made(chosen, lambda entry: _examples(entry, folder, per))


def _examples(entry: Entry, folder: Path, per: str) -> list[Example]:
    name = entry.text("filename")
    if entry.has("filepath") and (folder / entry.text("filepath")).is_dir():
        name = f"{entry.text('filepath')}/{name}"
    image, key = entry.image(folder, name), entry.key("cocoid" if entry.has("cocoid") else "imgid")
    texts = [sentence.plain("raw").strip() for sentence in entry.entries("sentences", "sentence")]
    facts: dict[str, str | int | float] = {"image_id": key, "split": entry.text("split")}
    if per == "image":
        return [Example(str(key), "caption", image, (Turn("", texts[0]),), references=tuple(texts), facts=facts)]
    return [
        Example(f"{key}:{number}", "caption", image, (Turn("", text),), facts=facts)
        for number, text in enumerate(texts)
    ]
