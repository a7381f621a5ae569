"""What mkdocs is told of this site: pages that the navigation names and that are not there are left out; plain docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe


class Plain(griffe.Extension):
    """Docstrings' shapes, `[layer](b n d)`, are text and no links."""

    def on_object(self, *, obj: griffe.Object, **given: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(`[^`]*`)|\](?=\()", lambda found: found[1] or r"\]", obj.docstring.value)


MISSING: set[str] = set()
"""Pages that the navigation names and that are not there."""


def on_config(config: Any) -> Any:
    config["nav"] = _written(config["nav"], Path(config["docs_dir"]))
    return config


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Links to such pages are text until the page is there."""
    return re.sub(r"\[([^]]+)\]\(([\w/.]+)\)", lambda link: link[1] if link[2] in MISSING else link[0], markdown)


def _written(nav: list[Any], docs: Path) -> list[Any]:
    """The entries whose files are there; a section without any is left out, too."""
    kept = []
    for entry in nav:
        name, place = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(place, list):
            if below := _written(place, docs):
                kept.append({name: below})
        elif (docs / place).is_file():
            kept.append(entry)
        else:
            MISSING.add(place)
    return kept
