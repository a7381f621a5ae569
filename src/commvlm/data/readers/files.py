"""Annotation files that nobody has looked at: JSON and JSON lines with errors that name the file and the place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Entry:
    """One JSON object of a file, and where it stands: `rec.jsonl:12` or `captions.json: annotation 17` (from 0)."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is a {_kind(value)}, it must be a JSON object")
        self.value: dict[str, Any] = value
        self.where = where

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.where} {what}")

    def has(self, field: str) -> bool:
        return field in self.value

    def text(self, field: str) -> str:
        """A text with something in it."""
        value = self._get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"has {field} {_short(value)}, it must be a text that is not blank")
        return value

    def string(self, field: str) -> str:
        """A text, which may be empty (annotators do leave answers so)."""
        value = self._get(field)
        if not isinstance(value, str):
            raise self.error(f"has {field} {_short(value)}, it must be a text")
        return value

    def integer(self, field: str) -> int:
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"has {field} {_short(value)}, it must be an integer")
        return value

    def key(self, field: str) -> str | int:
        """An identifier: an integer, or a text."""
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(f"has {field} {_short(value)}, it must be an integer or a text")
        return value

    def numbers(self, field: str) -> list[float]:
        value = self._get(field)
        if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):
            raise self.error(f"has {field} {_short(value)}, it must be a list of numbers")
        try:
            return [float(v) for v in value]
        except OverflowError:
            raise self.error(f"has {field} {_short(value)}, its numbers are too large") from None

    def entries(self, field: str, noun: str) -> list[Entry]:
        """A list of objects, not empty."""
        value = self._get(field)
        if not isinstance(value, list) or not value:
            raise self.error(f"has {field} {_short(value)}, it must be a list that is not empty")
        separator = " " if self.where.endswith(":") else ", "
        return [Entry(item, f"{self.where}{separator}{noun} {number}") for number, item in enumerate(value)]

    def image(self, folder: Path, name: str) -> Path:
        """The path of an image named in this entry. It must lie in the folder; whether it exists is seen on opening."""
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise self.error(f"names the image {_short(name)}, which is not inside the folder of images")
        return folder / name

    def _get(self, field: str) -> Any:
        if field not in self.value:
            raise self.error(f"has no {field}")
        return self.value[field]


def read_json(path: Path) -> Any:
    """The whole file's value. Raises ValueError naming the file when it is missing, empty or broken."""
    text = _text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{path.name}: nested too deeply to be an annotation file") from error


def read_object(path: Path) -> Entry:
    """A file that is one JSON object."""
    return Entry(read_json(path), f"{path.name}:")


def read_list(path: Path, noun: str) -> list[Entry]:
    """A file that is a JSON list of objects, not empty."""
    value = read_json(path)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path.name}: is {_short(value)}, it must be a JSON list that is not empty")
    return [Entry(item, f"{path.name}: {noun} {number}") for number, item in enumerate(value)]


def read_lines(path: Path) -> Iterator[tuple[int, Entry]]:
    """A file with one JSON object a line: line numbers from 1, and the objects. Blank lines are skipped."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}:"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} not JSON ({error.msg}, column {error.colno})") from error
        except RecursionError as error:
            raise ValueError(f"{where} nested too deeply to be an annotation") from error
        yield number, Entry(value, where)


def image_folder(images: Path) -> Path:
    if not images.is_dir():
        raise ValueError(f"{images}: there is no such folder of images")
    return images


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such annotation file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text (byte {error.start}); is it an annotation file?") from error
    if not text.strip():
        raise ValueError(f"{path.name}: is empty, there is nothing to read")
    return text


def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "text", "bool": "boolean"}.get(type(value).__name__, type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
