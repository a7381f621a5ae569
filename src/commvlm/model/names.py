"""Tables of named choices: look a name up, and answer a typo with the nearest valid name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def nearest(name: str, valid: list[str]) -> str:
    """`; did you mean 'x'?` when a valid name resembles `name`, else nothing; always followed by the valid names."""
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(sorted(valid))}"


def lookup(table: Mapping[str, T], name: str, *, what: str) -> T:
    """The row of `table` called `name`. Raises ValueError that names the nearest row."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, list(table))}")
    return table[name]


def choice(value: Any, *, of: tuple[str, ...], what: str) -> str:
    """`value` when it is one of `of`. Raises ValueError that names the nearest one."""
    if value not in of:
        raise ValueError(f"unknown {what} {value!r}; {nearest(str(value), list(of))}")
    return value


def options_of(kind: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only options of a module's constructor and their defaults: what a config may set."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def settle(spec: str | Mapping[str, Any], table: Mapping[str, Callable[..., Any]], *, what: str) -> dict[str, Any]:
    """A choice in full: `{"kind": name, every option of it}`, from a name or from a mapping with some options.

    Raises ValueError for an unknown kind or an unknown option, naming the nearest valid one.
    """
    given = {"kind": spec} if isinstance(spec, str) else dict(spec)
    if "kind" not in given:
        raise ValueError(f"{what} {dict(given)!r} has no 'kind'; {nearest('', list(table))}")
    kind = given.pop("kind")
    if not isinstance(kind, str):
        raise ValueError(f"{what} has kind {kind!r}; {nearest('', list(table))}")
    options = options_of(lookup(table, kind, what=what))
    for name in given:
        if name not in options:
            raise ValueError(
                f"{what} {kind!r} has no option {name!r}; {nearest(name, list(options)) if options else 'it has none'}"
            )
    return {"kind": kind, **options, **given}
