"""Measured text in a Markdown page, between two marks: written anew by a command, the rest of the page by hand."""

from __future__ import annotations

import os
from pathlib import Path


def write_between(page: Path, name: str, text: str) -> None:
    """Puts `text` between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page, in place of what is there.
    Raises ValueError without them."""
    begin, end = _marks(name)
    head, tail = _around(page, begin, end)
    part = page.with_suffix(".part")
    part.write_text(f"{head}{begin}{text}{end}{tail}", encoding="utf-8")
    os.replace(part, page)


def check_marks(page: Path, name: str) -> None:
    """Raises what `write_between` would, before there is anything to write."""
    _around(page, *_marks(name))


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def _around(page: Path, begin: str, end: str) -> tuple[str, str]:
    try:
        said = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page}: cannot be read ({error})") from error
    if said.count(begin) != 1 or said.count(end) != 1 or said.index(begin) > said.index(end):
        raise ValueError(f"{page}: needs the lines {begin.strip()} and {end.strip()}, between which the findings go")
    head, _, rest = said.partition(begin)
    return head, rest.partition(end)[2]
