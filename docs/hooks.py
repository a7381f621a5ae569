"""What mkdocs is told of this site: pages that the navigation names and that are not there are left out; plain docstrings;
the commands' own help as a page."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
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


COMMANDS = "reference/commands.md"


def on_page_markdown(markdown: str, page: Any, **given: Any) -> str:
    """Links to such pages are text until the page is there."""
    if page.file.src_uri == COMMANDS:
        from commvlm.cli import whole_parser

        os.environ["COLUMNS"] = "100"
        return "\n".join([markdown, *_helps(whole_parser())])
    return re.sub(r"\[([^]]+)\]\(([\w/.]+)\)", lambda link: link[1] if link[2] in MISSING else link[0], markdown)


def _helps(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A section for every command without commands of its own."""
    below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        text = "".join(f"    {line}".rstrip() + "\n" for line in parser.format_help().splitlines())
        yield f"## {parser.prog}\n\n{text}"
    for choices in below:
        for one in choices.values():
            yield from _helps(one)


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
