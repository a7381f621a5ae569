"""Annotation formats -> Examples: one small module a format, and `read` in front of them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..example import Example
from .captions import read_coco_captions
from .entities import read_entities
from .entry import EntryError, Read, short
from .genome import read_genome
from .hub import read_hub
from .karpathy import read_karpathy
from .llava import read_llava
from .mme import read_mme
from .pointqa import read_pointqa_local, read_pointqa_twice
from .pope import read_pope
from .refer import read_refer
from .refs import read_refs
from .sharegpt import read_sharegpt
from .shikra import (
    read_shikra_caption,
    read_shikra_rd,
    read_shikra_spotting,
    read_shikra_vqa,
    read_shikra_vqa_e,
    read_shikra_vqa_x,
)  # fmt: skip
from .shikra_places import read_shikra_pointqa_local, read_shikra_pointqa_twice, read_shikra_v7w
from .vcr import read_vcr
from .visual7w import read_visual7w
from .vqa import read_vqa

READERS: dict[str, Callable[..., Read]] = {
    "refer": read_refs,
    "refer-jsonl": read_refer,
    "visual-genome": read_genome,
    "visual7w": read_visual7w,
    "pointqa-local": read_pointqa_local,
    "pointqa-twice": read_pointqa_twice,
    "flickr30k-entities": read_entities,
    "coco-captions": read_coco_captions,
    "karpathy": read_karpathy,
    "vqa": read_vqa,
    "ok-vqa": read_vqa,
    "vcr": read_vcr,
    "pope": read_pope,
    "mme": read_mme,
    "llava": read_llava,
    "sharegpt": read_sharegpt,
    "datasets": read_hub,
    "shikra-caption": read_shikra_caption,
    "shikra-spotting": read_shikra_spotting,
    "shikra-rd": read_shikra_rd,
    "shikra-vqa": read_shikra_vqa,
    "shikra-vqa-e": read_shikra_vqa_e,
    "shikra-vqa-x": read_shikra_vqa_x,
    "shikra-pointqa-local": read_shikra_pointqa_local,
    "shikra-pointqa-twice": read_shikra_pointqa_twice,
    "shikra-v7w": read_shikra_v7w,
}

ASKS = {
    "pope": "pope", "mme": "mme", "vqa": "vqa", "ok-vqa": "vqa", "shikra-vqa": "vqa", "karpathy": "caption",
    "coco-captions": "caption", "shikra-caption": "caption", "pointqa-local": "pointqa", "pointqa-twice": "pointqa",
    "visual7w": "v7w", "shikra-v7w": "v7w", "vcr": "vcr",
}  # fmt: skip
"""Format -> the task of all its examples, where it has but one."""
SHOWN = 3
"""Places kept of every kind of fault."""


@dataclass
class Faults:
    """What was skipped: how often, and where first. kinds: what is wrong, without the entry's own values."""

    count: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, error: EntryError) -> None:
        kind = " ".join(error.what.split()[:3])
        self.count += 1
        self.kinds[kind] += 1
        if len(found := self.places.setdefault(kind, [])) < SHOWN:
            found.append(str(error))


def read(format: str, *, images: Path | str, faults: Faults | None = None, **files: Any) -> list[Example]:
    """The raw examples of a format's files. files: what the format's reader takes, its files and its choices.

    faults: entries that make no example are skipped and counted there; None refuses them, the first raises ValueError.
    Raises ValueError for an unknown format or argument, naming the nearest one, for a missing argument, and for what
    the files get wrong, naming the file and the place. Ids are unique within what is returned.
    """
    return list(stream(format, images=images, faults=faults, **files))


def stream(format: str, *, images: Path | str, faults: Faults | None = None, **files: Any) -> Iterator[Example]:
    """The same, one by one: lines and long lists are never whole in memory."""
    arguments = _checked(format, files)
    return _usable(format, READERS[format](images=Path(images), **arguments), faults)


def _usable(format: str, found: Read, faults: Faults | None) -> Iterator[Example]:
    """The examples, each id once; what is wrong is raised, or counted."""
    seen: set[str] = set()
    for item in found:
        if isinstance(item, Example) and item.id in seen:
            item = EntryError(f"{format}:", f"has the id {item.id!r} a second time")
        if isinstance(item, Example):
            seen.add(item.id)
            yield item
        elif faults is None:
            raise item
        else:
            faults.add(item)


def _checked(format: str, files: dict[str, Any]) -> dict[str, Any]:
    if format not in READERS:
        raise ValueError(f"there is no format {format!r}{_nearest(format, READERS)}; formats: {', '.join(READERS)}")
    parameters = arguments_of(format)
    for name in files:
        if name not in parameters:
            raise ValueError(f"{format} takes no {name!r}{_nearest(name, parameters)}, only {', '.join(parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in files:
            what = "give its file" if is_file(parameter) else f"one of {parameter.annotation}"
            raise ValueError(f"{format} needs {name}: {what}")
    for name, value in files.items():
        if not _fits(value, wanted := parameters[name].annotation):
            said = wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
            raise ValueError(f"{format}: {name} is {short(value)}, it must be {said}")
    return {name: Path(v) if is_file(parameters[name]) and v is not None else v for name, v in files.items()}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of a recipe is of an argument's type."""
    inner = get_args(kind)
    if kind in (Path, None, NoneType):
        return value is None if kind is not Path else isinstance(value, str | Path)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if get_origin(kind) is Literal:
        return isinstance(value, tuple({type(one) for one in inner}))  # which ones, the readers say
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def task_of(format: str, options: Mapping[str, Any]) -> str | None:
    """The task of a format's examples, where it can be told without its files."""
    parameter = arguments_of(format).get("task") if format in READERS else None
    return options.get("task") or (parameter.default if parameter is not None else ASKS.get(format))


@cache
def arguments_of(format: str) -> dict[str, inspect.Parameter]:
    """A format's files and choices, by name."""
    signature = inspect.signature(READERS[format], eval_str=True)
    return {name: parameter for name, parameter in signature.parameters.items() if name != "images"}


def is_file(parameter: inspect.Parameter) -> bool:
    """Whether an argument names a file or folder."""
    return parameter.annotation in (Path, Path | None)


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


__all__ = ["READERS", "EntryError", "Faults", "arguments_of", "is_file", "read", "stream", "task_of"]
