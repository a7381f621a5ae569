"""LLaVA's dialogues, pretraining and instruct.

[{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}]
"""

from __future__ import annotations

from pathlib import Path

from ..example import BOXES, IMAGE, POINTS, Example, Turn
from .entry import Entry, Read, made
from .files import image_folder, read_any

SPEAKERS = ("human", "gpt")


def read_llava(*, images: Path, conversations: Path, image_name: str = "{image}") -> Read:
    """One example of task "dialogue" an entry; without an "image" it is about none.

    `<image>`, first or last in the file, goes to the front of the first question and is put there when it is left out.
    image_name: how the images are called, with the entry's `{image}` in it: LLaVA-Instruct's names need
    "COCO_train2014_{image}" for COCO 2014's files.
    """
    if "{image}" not in image_name:
        raise ValueError(f"llava: image_name {image_name!r} names every image alike; put {{image}} in it")
    folder = image_folder(images)
    yield from made(read_any(conversations, "entry"), lambda entry: _example(entry, folder, image_name))


def _example(entry: Entry, folder: Path, image_name: str) -> Example:
    said = entry.entries("conversations", "message")
    if len(said) % 2:
        raise entry.error(f"has {len(said)} messages, they must be pairs of human and gpt")
    for number, message in enumerate(said):
        if message.text("from") != SPEAKERS[number % 2]:
            raise message.error(f"is from {message.text('from')!r}, it must be from {SPEAKERS[number % 2]!r}")
    texts = [_value(message, first=number == 0) for number, message in enumerate(said)]
    image = None
    if entry.has("image"):
        image = entry.image(folder, image_name.replace("{image}", entry.text("image")))
        texts[0] = f"{IMAGE}\n{texts[0]}"
    elif IMAGE in said[0].text("value"):
        raise entry.error(f"says {IMAGE} but has no image")
    turns = tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=True))
    facts = {"entry_id": entry.key("id")} if entry.has("id") else {}
    return Example(entry.id, "dialogue", image, turns, facts=facts)


def _value(message: Entry, *, first: bool) -> str:
    """A message's text without the image's slot, which only the first may hold, once."""
    text = message.text("value")
    if text.count(IMAGE) > int(first):
        raise message.error(f"says {IMAGE} {text.count(IMAGE)} times; one image, named in the first message, is read")
    for slot in (BOXES, POINTS):
        if slot in text:
            raise message.error(f"says {slot}, which is reserved")
    return text.replace(f"{IMAGE}\n", "").replace(f"\n{IMAGE}", "").replace(IMAGE, "").strip() if first else text
