"""Files of annotations: JSON, JSON lines, lists too long for memory, plain text, and pickles that may hold nothing else."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .entry import Entry, EntryError, numbered, short

CHUNK = 1 << 20
"""Characters read at a time of a list that is not held in memory."""
MAX_ITEM = 64 << 20
"""Characters of one item of such a list; a longer one is no annotation."""

_BLANK = re.compile(r"[ \t\r\n]*")
_DECODE = json.JSONDecoder().raw_decode


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


def read_list(path: Path, noun: str) -> Iterator[Entry | EntryError]:
    """A file that is a JSON list of objects, not empty, one by one: the list as a whole is never in memory."""
    return numbered(_items(path), f"{path.name}: {noun}", path.stem)


def read_lines(path: Path) -> Iterator[Entry | EntryError]:
    """A file with one JSON object a line, in order; ids carry the line's number, from 1. Blank lines are skipped."""
    _check_file(path)
    blank = True
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    blank = False
                    yield _line(line, f"{path.name}:{number}:", f"{path.stem}:{number}")
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from error
    if blank:
        raise _empty(path)


def read_any(path: Path, noun: str) -> Iterator[Entry | EntryError]:
    """A list or lines, as the file's first character says."""
    _check_file(path)
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return read_list(path, noun) if start.startswith(b"[") else read_lines(path)


def read_rows(path: Path) -> list[str]:
    """The lines of a plain text file, without their ends; blank ones are dropped."""
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def read_ids(path: Path) -> set[str]:
    """Identifiers, as a JSON list or one a line."""
    if _text(path).lstrip().startswith("["):
        value = read_json(path)
        if not all(isinstance(item, str | int) for item in value):
            raise ValueError(f"{path.name}: is {short(value)}, it must be a list of image ids")
        return {str(item) for item in value}
    return {row.split()[0] for row in read_rows(path)}


def read_pickle(path: Path) -> Any:
    """A pickle of plain containers: lists, tuples, dicts, texts and numbers. Nothing in it is called or imported.

    Texts of Python 2 are read as Latin-1. Raises ValueError for a pickle that asks for anything else, naming it.
    """
    _check_file(path)
    try:
        return _Plain(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except _Forbidden as error:
        raise ValueError(
            f"{path.name}: asks for {error} to be called, which a file of plain annotations never does; "
            "do not trust it, and get the original again"
        ) from None
    except (
        pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, ValueError, TypeError,
        OverflowError, RecursionError, MemoryError, AssertionError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path.name}: is no pickle, or a damaged one ({type(error).__name__})") from error


class _Forbidden(Exception):
    pass


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Forbidden(f"persistent id {short(pid)}")


def image_folder(images: Path) -> Path:
    if not images.is_dir():
        raise ValueError(f"{images}: there is no such folder of images")
    return images


def _line(line: str, where: str, id: str) -> Entry | EntryError:
    try:
        return Entry(json.loads(line), where, id)
    except EntryError as error:
        return error
    except json.JSONDecodeError as error:
        return EntryError(where, f"not JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return EntryError(where, "nested too deeply to be an annotation")


def _items(path: Path) -> Iterator[Any]:
    """The values of a file that is one JSON list, one at a time."""
    _check_file(path)
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            window = _Window(file)
            first = window.next()
            if not first:
                raise _empty(path)
            if first != "[":
                raise ValueError(f"{path.name}: begins with {first!r}, it must be a JSON list that is not empty")
            window.step()
            while window.next() != "]":
                if number:
                    window.expect(",")
                yield window.value()
                number += 1
            window.step()
            if window.next():
                raise json.JSONDecodeError("something stands behind the list", window.text, window.place)
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: item {number}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"{path.name}: item {number}: nested too deeply to be an annotation") from error
    if not number:
        raise ValueError(f"{path.name}: is [], it must be a JSON list that is not empty")


class _Window:
    """A file's text from `place` on, as far as it has been read."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.place = 0

    def more(self) -> bool:
        """Reads on, at least as much as is held already; False at the end."""
        piece = self.file.read(max(CHUNK, len(self.text) - self.place))
        self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)

    def next(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            self.place = _BLANK.match(self.text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def step(self) -> None:
        self.place += 1

    def expect(self, mark: str) -> None:
        if self.next() != mark:
            raise json.JSONDecodeError(f"no {mark!r} behind an item", self.text, self.place)
        self.step()
        self.next()

    def value(self) -> Any:
        """The value that begins here. It is whole only when something stands behind it: a number may go on."""
        while True:
            try:
                value, end = _DECODE(self.text, self.place)
            except json.JSONDecodeError:
                if len(self.text) - self.place > MAX_ITEM or not self.more():
                    raise
                continue
            length = end - self.place
            if end < len(self.text) or not self.more():
                self.place += length
                return value


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such annotation file")


def _no_text(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path.name}: not UTF-8 text (byte {error.start}); is it an annotation file?")


def _empty(path: Path) -> ValueError:
    return ValueError(f"{path.name}: is empty, there is nothing to read")


def _text(path: Path) -> str:
    _check_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from error
    if not text.strip():
        raise _empty(path)
    return text
