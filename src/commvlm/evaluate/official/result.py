"""What an offline score is, and how references and predictions find each other: by id, every one exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from commvlm.data.readers.entry import Entry, EntryError, numbered
from commvlm.data.readers.files import read_any

from ..tasks import Score

Value = TypeVar("Value")
Key = str
"""An id as text: 17 and "17" are the same id."""


@dataclass(frozen=True)
class Official:
    """score: as the runner gives it. figures: the official code's, under its names and in its units. files: what was read."""

    score: Score
    figures: Mapping[str, object]
    files: Mapping[str, Path]


def rows(path: Path) -> list[Entry]:
    """The objects of a file of JSON lines or of one JSON list. Raises ValueError naming the file and the place."""
    return [_usable(entry) for entry in read_any(path, "entry")]


def listed(value: object, path: Path) -> list[Entry]:
    """The objects of a JSON list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path.name}: must be a JSON list of objects that is not empty")
    return [_usable(entry) for entry in numbered(value, f"{path.name}: entry")]


def _usable(entry: Entry | EntryError) -> Entry:
    if isinstance(entry, EntryError):
        raise entry
    return entry


def by_id(
    entries: Sequence[Entry], read: Callable[[Entry], Value], *, id: str, repeats: bool = False, prefix: str = ""
) -> dict[Key, Value]:
    """Entries by their field `id`. repeats: whether an id may come again with an equal value (it then counts once).
    prefix: what ids may begin with and are the same without.

    Raises ValueError naming the place and the id for a second entry of one id.
    """
    found: dict[Key, Value] = {}
    places: dict[Key, str] = {}
    for entry in entries:
        key, value = str(entry.key(id)).removeprefix(prefix), read(entry)
        if key in found and not (repeats and found[key] == value):
            raise entry.error(f"has {id} {key} a second time; {places[key].rstrip(':')} has it already")
        found[key], places[key] = value, entry.where
    return found


def check_same_ids(
    references: Mapping[Key, object], predictions: Mapping[Key, object], *, what: str, names: tuple[str, str]
) -> None:
    """Raises ValueError naming the first id that only one side holds. names: of the files of references, predictions."""
    unknown = [key for key in predictions if key not in references]
    if unknown:
        raise ValueError(
            f"{names[1]}: {what} {unknown[0]}{_others(unknown)} is not in {names[0]}; is it the right file?"
        )
    missing = [key for key in references if key not in predictions]
    if missing:
        raise ValueError(
            f"{names[1]}: has no prediction for {what} {missing[0]}{_others(missing)} of {names[0]}; each needs exactly one"
        )


def _others(keys: Sequence[Key]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def sorted_ids(keys: Mapping[Key, object]) -> list[Key]:
    """Whole numbers by size, in front of other texts."""
    return sorted(keys, key=lambda key: (not key.isdecimal(), int(key) if key.isdecimal() else 0, key))
