"""RefCOCO, RefCOCO+ and RefCOCOg as `refer` distributes them: a pickle of references and COCO's instances.

refs(unc).p, refs(umd).p, refs(google).p:
    [{ref_id, ann_id, image_id, category_id, split, file_name, sent_ids, sentences: [{sent_id, sent, raw, tokens}]}]
instances.json: {"images": [{id, file_name, width, height}], "annotations": [{id, bbox: [x, y, width, height]}]}

A reference's own file_name has its number at the end and is no file; the image's stands in instances.json. Images are
COCO's train2014. Use RefCOCOg's umd split: google's shares images between train and val.
"""

from __future__ import annotations

from pathlib import Path

from ..example import BOXES, Box, Example, Turn
from .entry import Entry, EntryError, Read, made, numbered
from .files import image_folder, read_object, read_pickle
from .refer import Group, Refer, referring

SPLITS = ("train", "val", "testA", "testB", "test")


def read_refs(
    *, images: Path, refs: Path, instances: Path, split: str, task: Refer = "rec", group: Group | None = None
) -> Read:
    """rec: one example a sentence, as it is scored. reg: one a reference ("object", the default: all its sentences as
    references) or one a sentence ("line", for training).

    ids are the sentence's, or the reference's. facts: ref_id, ann_id, sent_id, image_id, category_id, split, width, height.
    """
    if split not in SPLITS:
        raise ValueError(f"refer: split is {split!r}, it must be one of {', '.join(SPLITS)}")
    if task not in ("rec", "reg", "gc") or group not in (None, "line", "object") or (task, group) == ("rec", "object"):
        raise ValueError(f"refer: there is no task {task!r} by {group!r}: rec by line, reg and gc by line or object")
    folder, objects = image_folder(images), _Objects(instances)
    listed = read_pickle(refs)
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{refs.name}: holds a {type(listed).__name__}, it must be a list of references")
    if not any(isinstance(ref, dict) and ref.get("split") == split for ref in listed):
        known = sorted({str(ref.get("split")) for ref in listed if isinstance(ref, dict)})
        raise ValueError(f"{refs.name}: has no reference of split {split!r}; it has {', '.join(known)}")
    by_line = task == "rec" or group == "line"
    entries = numbered(listed, f"{refs.name}: reference", refs.stem)
    wanted = (e for e in entries if isinstance(e, EntryError) or e.value.get("split") == split)
    yield from made(wanted, lambda ref: _examples(ref, objects, folder, task, by_line=by_line))


def _examples(ref: Entry, objects: _Objects, folder: Path, task: Refer, *, by_line: bool) -> list[Example]:
    image, box, size = objects.of(ref, folder)
    facts = {name: ref.integer(name) for name in ("ref_id", "ann_id", "image_id", "category_id")}
    shared = {**facts, "split": ref.text("split"), **size}
    said = [(sentence.integer("sent_id"), sentence.plain("sent")) for sentence in ref.entries("sentences", "sentence")]
    if by_line:
        return [
            referring(str(sent_id), image, text, box, task=task, facts={**shared, "sent_id": sent_id})
            for sent_id, text in said
        ]
    turn = Turn(BOXES, said[0][1], question_boxes=((box,),))
    texts = tuple(text for _, text in said)
    return [Example(str(facts["ref_id"]), task, image, (turn,), references=texts, facts=shared)]


class _Objects:
    """Where every annotated object is: annotation id -> image file, box, size of the image."""

    def __init__(self, instances: Path) -> None:
        self.name = instances.name
        file = read_object(instances)
        self.images = {entry.integer("id"): entry for entry in file.entries("images", "image")}
        self.annotations = {entry.integer("id"): entry for entry in file.entries("annotations", "annotation")}

    def of(self, ref: Entry, folder: Path) -> tuple[Path, Box, dict[str, str | int | float]]:
        ann_id, image_id = ref.integer("ann_id"), ref.integer("image_id")
        if ann_id not in self.annotations or image_id not in self.images:
            raise ref.error(f"has ann_id {ann_id} and image_id {image_id}, which are not both in {self.name}")
        annotation, image = self.annotations[ann_id], self.images[image_id]
        if annotation.has("image_id") and annotation.integer("image_id") != image_id:
            raise ref.error(f"has image_id {image_id}, its annotation {ann_id} has {annotation.integer('image_id')}")
        return image.image(folder, image.text("file_name")), annotation.box("bbox", "xywh"), image.size()
