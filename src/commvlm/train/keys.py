"""A recipe's keys: which there are, and setting one from the command line by its dotted name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import yaml

COMMAND_LINE = "the command line"


class RecipeError(ValueError):
    """A recipe that is not there, not YAML, or says something that cannot be: one line with file and key."""


@functools.cache
def fields_of(kind: Any) -> Mapping[str, Any]:
    """Field names of a dataclass and their types."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def dataclass_in(kind: Any) -> Any:
    """The dataclass of a field's type: itself, a list's, or one that may be None; None for other types."""
    if dataclasses.is_dataclass(kind):
        return kind
    if typing.get_origin(kind) in (list, types.UnionType):
        return next((inner for inner in typing.get_args(kind) if dataclasses.is_dataclass(inner)), None)
    return None


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The end of an error about a key that there is not: the nearest one, or all."""
    names = sorted(known)
    near = get_close_matches(key, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def check_keys(content: Any, kind: Any, *, where: str, key: str = "") -> None:
    """Raises RecipeError for the first key that the dataclass `kind` does not have, naming the nearest one, and where a
    mapping or a list belongs and something else stands. key: the dotted name of what `content` is the value of."""
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        if not isinstance(content, list):
            raise RecipeError(f"{where}: {key} must be a list, it is {short(content)}")
        for number, item in enumerate(content):
            check_keys(item, inner, where=where, key=f"{key}[{number}]")
    elif content is not None or dataclasses.is_dataclass(kind):
        kind = dataclass_in(kind)
    if not dataclasses.is_dataclass(kind):
        return
    known = fields_of(kind)
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: {key} must be a mapping with the keys {', '.join(known)}, it is {short(content)}")
    for name, value in content.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in known:
            raise RecipeError(f"{where}: unknown key {dotted!r}{nearest_key(str(name), known)}")
        check_keys(value, known[name], where=where, key=dotted)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values above on top of those below: mappings key by key, everything else as a whole.

    A mapping with a `kind` is one choice with its options, and a whole.
    """
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and "kind" not in value
        result[key] = merged(result[key], value) if both else value
    return result


def override(content: Mapping[str, Any], options: Sequence[str], kind: Any) -> dict[str, Any]:
    """The content with options such as `--train.seed 1`, `--train.seed=1` and `--train.stages.align.steps 3` set in it.

    An item of a list goes by its name, values are YAML. kind: the content's dataclass. Raises RecipeError for an option
    that is no key, naming the nearest one, and for one without a value.
    """
    content = copy.deepcopy(dict(content))
    left = list(options)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if not name.startswith("--") or name == "--":
            raise RecipeError(f"{COMMAND_LINE}: {name!r} is no option; options are such as --train.seed 1")
        holder, key, inner = _place(content, name[2:].split("."), kind, option=name, whole=(content, kind))
        if not equals:
            if not left or left[0].startswith("--"):
                raise RecipeError(f"{COMMAND_LINE}: option {name!r} has no value")
            value = left.pop(0)
        holder[key] = value if inner is str else _value(value, name)
        check_keys(holder[key], inner, where=COMMAND_LINE, key=name[2:])
    return content


def _place(
    value: Any, names: Sequence[str], kind: Any, *, option: str, whole: tuple[Any, Any]
) -> tuple[dict[str, Any], str, Any]:
    """The mapping in which an option's value belongs, its key there, and its type.

    value: what `names` go on from, of type `kind`. whole: the recipe and its type, for the nearest key.
    """
    name, *rest = names
    inner = _kind_of(kind, name)
    if inner is None:
        near = get_close_matches(option[2:], dotted_keys(*whole), n=1, cutoff=0.4)
        hint = f"did you mean {'--' + near[0]!r}?" if near else f"known: {', '.join(fields_of(whole[1]))}"
        raise RecipeError(f"{COMMAND_LINE}: unknown option {option!r}; {hint}")
    if typing.get_origin(kind) is list:
        item = _item(value, name, option)
        if not rest:
            raise RecipeError(f"{COMMAND_LINE}: option {option!r} names an item of a list; name one of its keys, too")
        return _place(item, rest, inner, option=option, whole=whole)
    if not rest:
        return value, name, inner
    below = value.setdefault(name, [] if typing.get_origin(inner) is list else {})
    return _place(below, rest, inner, option=option, whole=whole)


def _kind_of(kind: Any, name: str) -> Any:
    """The type of what is called `name` in a value of type `kind`; None where there can be no such thing."""
    if dataclasses.is_dataclass(kind):
        return fields_of(kind).get(name)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list and dataclasses.is_dataclass(arguments[0]):
        return arguments[0]
    return arguments[1] if typing.get_origin(kind) is dict else None


def dotted_keys(content: Any, kind: Any, prefix: str = "") -> list[str]:
    """Every key that can be set in the content, items of lists by their names."""
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        named = [item for item in content or () if isinstance(item, dict) and "name" in item]
        return [key for item in named for key in dotted_keys(item, inner, f"{prefix}{item['name']}.")]
    if not dataclasses.is_dataclass(kind):
        return []
    keys = []
    for name, inner in fields_of(kind).items():
        keys.append(prefix + name)
        keys += dotted_keys((content or {}).get(name), inner, f"{prefix}{name}.")
    return keys


def _item(items: list[Any], name: str, option: str) -> Any:
    """The item of a list that has this name."""
    named = {str(item["name"]): item for item in items if isinstance(item, dict) and "name" in item}
    if name not in named:
        raise RecipeError(f"{COMMAND_LINE}: option {option!r}: there is no {name!r}{nearest_key(name, named)}")
    return named[name]


def _value(text: str, option: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{COMMAND_LINE}: the value of {option!r} is not YAML: {short(text)}") from error


def short(value: Any) -> str:
    """A value for an error's line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
