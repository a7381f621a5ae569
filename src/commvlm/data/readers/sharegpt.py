"""Dialogues with boxes in their text, as LLaVA-like, Qwen-VL, InternVL and Shikra-like data have them.

[{"id", "image", "width", "height", "conversations": [{"from": "human", "value": "Where is <ref>the cup</ref>?"},
  {"from": "gpt", "value": "<box>[[100, 200, 300, 400]]</box>"}]}], as a list or as lines; or "messages" of role and content.
Qwen-VL's entries name their image in the text: "Picture 1: <img>a.jpg</img>".

Boxes are read as [x1, y1, x2, y2], several with ; or in a list of lists, and as (x1,y1),(x2,y2). What their numbers mean
differs from file to file, and nothing in a file says it: `boxes` must (`data.convention.detect` tells it from many).
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from ..convention import Convention, convention_of
from ..example import BOXES, IMAGE, RESERVED, Box, Example, Turn
from .entry import Entry, Read, made
from .files import image_folder, read_any

SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_N = r"-?\d+(?:\.\d+)?"
_FOUR = rf"{_N}(?:\s*,\s*{_N}){{3}}"
_ONE = rf"\[\s*{_FOUR}(?:\s*;\s*{_FOUR})*\s*\]"
_PAIR = rf"\(\s*{_N}\s*,\s*{_N}\s*\)"
_CORNERS = rf"{_PAIR}\s*,\s*{_PAIR}"
_GROUP = re.compile(
    rf"(?:<box>|<\|box_start\|>)?(\[\s*{_ONE}(?:\s*,\s*{_ONE})*\s*\]|{_ONE}|{_CORNERS})(?:</box>|<\|box_end\|>)?"
)
_PICTURE = re.compile(r"(?:Picture \d+: ?)?<img>(.*?)</img>")
_NAMES = re.compile(r"</?ref>|<\|object_ref_(?:start|end)\|>")


def read_sharegpt(*, images: Path, conversations: Path, boxes: str | None = None, image_name: str = "{image}") -> Read:
    """One example of task "dialogue" an entry; its boxes become `<boxes>` slots, in pixels of the original image.

    boxes: the convention of the file's numbers (see `data.convention`), such as "xyxy-0-1000"; None leaves all text as it is.
    Their image's size is the entry's width and height, or the file's where it says none. image_name: as `llava` takes it.
    """
    if "{image}" not in image_name:
        raise ValueError(f"sharegpt: image_name {image_name!r} names every image alike; put {{image}} in it")
    convention = None if boxes is None else convention_of(boxes)
    folder = image_folder(images)
    yield from made(read_any(conversations, "entry"), lambda entry: _example(entry, folder, convention, image_name))


def _example(entry: Entry, folder: Path, convention: Convention | None, image_name: str) -> Example:
    named = entry.text("image") if entry.has("image") else _pictured(entry)
    image = None if named is None else entry.image(folder, image_name.replace("{image}", named))
    facts = {"entry_id": entry.key("id")} if entry.has("id") else {}
    turns = dialogue_of(entry, image, convention)
    return Example(entry.id, "dialogue", image, turns, facts={**facts, **entry.size()})


def _pictured(entry: Entry) -> str | None:
    """The image that the texts name. Raises EntryError for several."""
    found = {name.strip() for message in _messages(entry) for name in _PICTURE.findall(_said(message)[1])}
    if len(found) > 1:
        raise entry.error(f"shows {len(found)} images; one is read")
    return next(iter(found), None)


def dialogue_of(entry: Entry, image: Path | None, convention: Convention | None) -> tuple[Turn, ...]:
    """An entry's turns, the image's slot in front of the first question, boxes as numbers."""
    said = [(message, *_said(message)) for message in _messages(entry)]
    if said[0][1] == "system":
        said = said[1:]
    if not said or len(said) % 2:
        raise entry.error(f"has {len(said)} messages, they must be pairs of a user's and an assistant's")
    sides: list[tuple[str, tuple[tuple[Box, ...], ...]]] = []
    for number, (message, speaker, text) in enumerate(said):
        if SPEAKERS.get(speaker) != number % 2:
            raise message.error(f"is from {speaker!r}, it must be from {'human' if number % 2 == 0 else 'gpt'}")
        text = _PICTURE.sub(IMAGE, text)
        if number == 0 and image is not None:
            if text.count(IMAGE) > 1:
                raise message.error(f"says {IMAGE} {text.count(IMAGE)} times; one image is read")
            text = text.replace(f"{IMAGE}\n", "").replace(f"\n{IMAGE}", "").replace(IMAGE, "").strip()
        for slot in RESERVED:
            if slot in text:
                raise message.error(f"says {slot}, which is reserved or has no image")
        if convention is not None and image is not None:
            sides.append(_grounded(entry, message, text, image, convention))
        else:
            sides.append((text, ()))
    if image is not None:
        sides[0] = (f"{IMAGE}\n{sides[0][0]}", sides[0][1])
    return tuple(
        Turn(question, answer, question_boxes=asked, answer_boxes=told)
        for (question, asked), (answer, told) in zip(sides[::2], sides[1::2], strict=True)
    )


def _messages(entry: Entry) -> list[Entry]:
    return entry.entries("conversations" if entry.has("conversations") else "messages", "message")


def _said(message: Entry) -> tuple[str, str]:
    if message.has("role"):
        return message.text("role"), message.text("content")
    return message.text("from"), message.text("value")


def _grounded(
    entry: Entry, message: Entry, text: str, image: Path, convention: Convention
) -> tuple[str, tuple[tuple[Box, ...], ...]]:
    """A text with a slot for each group of boxes in it, and the groups in pixels."""
    groups = []
    for match in _GROUP.finditer(text):
        width, height = _size(entry, image)
        numbers = [float(number) for number in re.findall(_N, match[1])]
        boxes = [convention.pixels(numbers[k : k + 4], width, height) for k in range(0, len(numbers), 4)]
        groups.append(tuple(message.corners(list(box), "box") for box in boxes))
    return _NAMES.sub("", _GROUP.sub(BOXES, text)), tuple(groups)


def _size(entry: Entry, image: Path) -> tuple[int, int]:
    if entry.has("width") and entry.has("height"):
        return entry.integer("width"), entry.integer("height")
    try:
        with Image.open(image) as opened:  # the header alone
            return opened.size
    except (OSError, ValueError, SyntaxError) as error:
        raise entry.error(f"says no width and height, and {image.name} cannot tell them ({error})") from error
