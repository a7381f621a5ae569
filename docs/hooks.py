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


def on_config(config: Any) -> Any:
    config["nav"] = _written(config["nav"], Path(config["docs_dir"]))
    return config


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
    return kept
