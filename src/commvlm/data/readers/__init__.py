"""Annotation formats -> Examples: one small module a format, and `read` in front of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..example import Example
from .captions import read_coco_captions
from .llava import read_llava
from .pope import read_pope
from .refer import read_refer
from .vqa import read_vqa

READERS: dict[str, Callable[..., list[Example]]] = {
    "refer-jsonl": read_refer,
    "coco-captions": read_coco_captions,
    "vqa": read_vqa,
    "pope": read_pope,
    "llava": read_llava,
}

_FILES = ("annotations", "questions", "conversations")


def read(format: str, *, images: Path | str, **files: Any) -> list[Example]:
    """The raw examples of a format's files. files: what the format's reader takes, its files and its choices.

    Raises ValueError for an unknown format or argument, naming the nearest one, for a missing argument, and for what
    the files get wrong, naming the file and the place. Ids are unique within what is returned.
    """
    if format not in READERS:
        raise ValueError(f"there is no format {format!r}{_nearest(format, READERS)}; formats: {', '.join(READERS)}")
    reader = READERS[format]
    parameters = {name: p for name, p in inspect.signature(reader).parameters.items() if name != "images"}
    for name in files:
        if name not in parameters:
            raise ValueError(f"{format} takes no {name!r}{_nearest(name, parameters)}, only {', '.join(parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in files:
            raise ValueError(f"{format} needs {name}: give its file")
    given = {name: Path(value) if name in _FILES else value for name, value in files.items()}
    return reader(images=Path(images), **given)


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


__all__ = ["READERS", "read", "read_coco_captions", "read_llava", "read_pope", "read_refer", "read_vqa"]
