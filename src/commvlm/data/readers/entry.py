"""One object of an annotation file that nobody has looked at, with errors that name the file and the place.

Two kinds of fault. A file that is not what it says (missing, no JSON, another format) is a ValueError. One entry of it that
cannot be used is an EntryError, which readers yield in the example's place: `read` refuses it, or skips and counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from ..example import RESERVED, Box, Example, Point

Layout = Literal["xyxy", "xywh"]


class EntryError(ValueError):
    """One entry of a file that cannot be used: where it stands (`rec.jsonl:12:`) and what is wrong with it."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where} {what}")
        self.where = where
        self.what = what


class Entry:
    """One object of a file, and where it stands: `rec.jsonl:12:` or `captions.json: annotation 17` (from 0).

    id: of the example that it becomes, where the file has no own: the file's name and the number.
    """

    def __init__(self, value: Any, where: str, id: str = "") -> None:
        if not isinstance(value, dict):
            raise EntryError(where, f"is a {_kind(value)}, it must be a JSON object")
        self.value: dict[str, Any] = value
        self.where = where
        self.id = id

    def error(self, what: str) -> EntryError:
        return EntryError(self.where, what)

    def has(self, field: str) -> bool:
        return field in self.value

    def raw(self, field: str) -> Any:
        """Whatever stands there."""
        if field not in self.value:
            raise self.error(f"has no {field}")
        return self.value[field]

    def text(self, field: str) -> str:
        """A text with something in it."""
        value = self.raw(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"has {field} {short(value)}, it must be a text that is not blank")
        return value

    def plain(self, field: str) -> str:
        """A text with something in it that says none of the reserved slots."""
        return self.without_slots(self.text(field), field)

    def without_slots(self, text: str, field: str) -> str:
        for slot in RESERVED:
            if slot in text:
                raise self.error(f"has {slot} in its {field}, which is reserved")
        return text

    def string(self, field: str) -> str:
        """A text, which may be empty (annotators do leave answers so)."""
        value = self.raw(field)
        if not isinstance(value, str):
            raise self.error(f"has {field} {short(value)}, it must be a text")
        return value

    def integer(self, field: str) -> int:
        value = self.raw(field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"has {field} {short(value)}, it must be an integer")
        return value

    def key(self, field: str) -> str | int:
        """An identifier: an integer, or a text."""
        value = self.raw(field)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(f"has {field} {short(value)}, it must be an integer or a text")
        return value

    def numbers(self, field: str) -> list[float]:
        return self.floats(self.raw(field), field)

    def floats(self, value: Any, field: str) -> list[float]:
        if not isinstance(value, list | tuple) or not all(type(v) in (int, float) for v in value):
            raise self.error(f"has {field} {short(value)}, it must be a list of numbers")
        try:
            return [float(v) for v in value]
        except OverflowError:
            raise self.error(f"has {field} {short(value)}, its numbers are too large") from None

    def box(self, field: str, layout: Layout = "xyxy") -> Box:
        """A box, as corners; see `corners`."""
        return self.corners(self.numbers(field), field, layout)

    def named_box(self, field: str | None = None) -> Box:
        """A box as x, y, width (or w), height (or h), in this entry or in the object of that name."""
        entry = self if field is None else self.entry(field)
        names = [name if entry.has(name) else name[0] for name in ("x", "y", "width", "height")]
        values = entry.floats([entry.raw(name) for name in names], "box")
        return entry.corners(values, "box", "xywh")

    def corners(self, values: list[float], field: str, layout: Layout = "xyxy") -> Box:
        """Four numbers as x1, y1, x2, y2. They must be finite and span something; they may leave the image."""
        if len(values) != 4:
            what = "x1, y1, x2, y2" if layout == "xyxy" else "x, y, width, height"
            raise self.error(f"has a {field} of {len(values)} numbers, it must be {what}")
        if not all(math.isfinite(value) for value in values):
            raise self.error(f"has {field} {values}, its numbers must be finite")
        x1, y1, x2, y2 = values
        if layout == "xywh":
            x2, y2 = x1 + x2, y1 + y2
        if x2 <= x1 or y2 <= y1:
            rule = "x1 < x2 and y1 < y2, in pixels" if layout == "xyxy" else "width and height above 0"
            raise self.error(f"has {field} {values}, its corners are swapped or it is empty ({rule})")
        return x1, y1, x2, y2

    def point(self, field: str) -> Point:
        """A point, as [x, y] or as an object with x and y."""
        value = self.raw(field)
        if isinstance(value, dict):
            entry = self.entry(field)
            value = [entry.raw("x"), entry.raw("y")]
        values = self.floats(value, field)
        if len(values) != 2 or not all(math.isfinite(v) for v in values):
            raise self.error(f"has {field} {short(value)}, it must be x, y, finite numbers in pixels")
        return values[0], values[1]

    def texts(self, field: str) -> list[str]:
        """A list of texts, not empty, none of them blank."""
        value = self.list(field)
        if not all(isinstance(item, str) and item.strip() for item in value):
            raise self.error(f"has {field} {short(value)}, it must be a list of texts")
        return value

    def list(self, field: str) -> list[Any]:
        """A list of anything, not empty."""
        value = self.raw(field)
        if not isinstance(value, list) or not value:
            raise self.error(f"has {field} {short(value)}, it must be a list that is not empty")
        return value

    def entry(self, field: str) -> Entry:
        """An object within this one."""
        return Entry(self.raw(field), f"{self.where}{self._comma}{field}")

    def entries(self, field: str, noun: str) -> list[Entry]:
        """A list of objects, not empty."""
        found = []
        for entry in self.each(field, noun):
            if isinstance(entry, EntryError):
                raise entry
            found.append(entry)
        return found

    def each(self, field: str, noun: str) -> Iterator[Entry | EntryError]:
        """The same one by one, so that one that is none does not hide the others."""
        return numbered(self.list(field), f"{self.where}{self._comma}{noun}")

    def image(self, folder: Path, name: str) -> Path:
        """The path of an image named in this entry. It must lie in the folder; whether it exists is seen on opening."""
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise self.error(f"names the image {short(name)}, which is not inside the folder of images")
        return folder / name

    def size(self) -> dict[str, str | int | float]:
        """{"width", "height"} where the entry says them."""
        if not (self.has("width") or self.has("height")):
            return {}
        return {"width": self.integer("width"), "height": self.integer("height")}

    @property
    def _comma(self) -> str:
        return " " if self.where.endswith(":") else ", "


Read = Iterator[Example | EntryError]
"""What a reader gives: examples, and in place of an entry that makes none, why."""


def made(
    entries: Iterable[Entry | EntryError], make: Callable[[Entry], Example | Iterable[Example | EntryError]]
) -> Read:
    """Every entry's example (or examples); an entry that cannot be used gives its error in their place."""
    for entry in entries:
        if isinstance(entry, EntryError):
            yield entry
            continue
        try:
            found = make(entry)
            examples = [found] if isinstance(found, Example) else list(found)
        except EntryError as error:
            yield error
        else:
            yield from examples


def numbered(values: Iterable[Any], what: str, stem: str = "") -> Iterator[Entry | EntryError]:
    """Each value as an entry `{what} {number}`, from 0; one that is no object as its error."""
    for number, value in enumerate(values):
        try:
            yield Entry(value, f"{what} {number}", f"{stem}:{number}")
        except EntryError as error:
            yield error


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "text", "bool": "boolean"}.get(type(value).__name__, type(value).__name__)
