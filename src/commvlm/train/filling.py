"""Mappings as frozen dataclasses: nested ones are made here, the types of values are jsonargparse's matter."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .keys import RecipeError, dataclass_in, fields_of, short

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Made = TypeVar("Made")


def filled(content: Mapping[str, Any], kind: type[Made], where: str, key: str = "") -> Made:
    """The dataclass `kind` with these values, whose keys `keys.check_keys` has seen. key: dotted, of what `content` is the
    value of. Raises RecipeError with the key for a value of another type, and for one that is not given and must be."""
    before = f"{key}." if key else ""
    missing = [before + name for name in _required(kind) if name not in content]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} must be given")
    given: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in content.items():
        wanted = fields_of(kind)[name]
        inner = dataclass_in(wanted)
        if value is None and type(None) not in typing.get_args(wanted):
            raise RecipeError(f"{where}: {before}{name}: expected {words(wanted)}. Got value: null")
        if inner is None or value is None:
            plain[name] = value
        elif isinstance(value, list):
            given[name] = [filled(item, inner, where, f"{before}{name}[{n}]") for n, item in enumerate(value)]
        else:
            given[name] = filled(value, inner, where, before + name)
    return kind(**given, **_checked(plain, kind, where, before))


def _checked(plain: Mapping[str, Any], kind: type, where: str, before: str) -> dict[str, Any]:
    """Values that are no dataclasses, as their fields' types have them."""
    from argparse import ArgumentError

    parser = _parser(kind)
    try:
        made = parser.instantiate(parser.parse_object({name: v for name, v in plain.items() if v is not None}))
    except (ArgumentError, TypeError) as error:
        found = re.search(r'Parser key "(\w+)', str(error))
        if found is None:
            raise RecipeError(f"{where}: {before or 'the whole'}: {' '.join(str(error).split())}") from error
        name = found[1]
        wanted = f"expected {words(fields_of(kind)[name])}. Got value: {short(plain[name])}"
        raise RecipeError(f"{where}: {before}{name}: {wanted}") from error
    return {name: None if value is None else made[name] for name, value in plain.items()}


@functools.cache
def _parser(kind: type) -> ArgumentParser:
    """For the fields that are no dataclasses; none of them is required here."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    for name, wanted in fields_of(kind).items():
        if dataclass_in(wanted) is None:
            parser.add_argument(f"--{name}", type=wanted)
    return parser


@functools.cache
def _required(kind: Any) -> tuple[str, ...]:
    """Fields that have no default."""
    none = dataclasses.MISSING
    return tuple(f.name for f in dataclasses.fields(kind) if f.default is none and f.default_factory is none)


def words(kind: Any) -> str:
    """A type for people: "int or null", "'bf16' or 'fp32'", "list[str]"."""
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(map(words, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")
