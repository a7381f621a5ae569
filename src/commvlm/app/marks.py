"""Measured text in a Markdown page, between two marks: written anew by a command, the rest of the page by hand."""

from __future__ import annotations

import os
from pathlib import Path


def write_between(page: Path, name: str, text: str) -> None:
    """Puts `text` between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page, in place of what is there.
    Raises ValueError without them."""
    begin, end = (f"<!-- {name}: {word} -->\n" for word in ("begin", "end"))
    said = page.read_text(encoding="utf-8")
    if said.count(begin) != 1 or said.count(end) != 1:
        raise ValueError(f"{page}: needs the lines {begin.strip()} and {end.strip()}, between which the findings go")
    head, _, rest = said.partition(begin)
    part = page.with_suffix(".part")
    part.write_text(f"{head}{begin}{text}{end}{rest.partition(end)[2]}", encoding="utf-8")
    os.replace(part, page)
