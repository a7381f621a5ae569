"""The command line: parses, calls, prints. Bad input is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from .chat import add_chat
from .command import Parser
from .data import add_data
from .demo import add_demo
from .evaluate import add_evaluate
from .export import add_export
from .microworld import add_microworld
from .model import add_build, add_compare, add_import, add_inspect, add_recipes
from .plan import add_plan
from .probe import add_probe
from .receipts import add_receipts, add_rescore
from .score import add_score
from .serve import add_serve
from .study import add_study
from .train import add_quickstart, add_train

COMMANDS = (
    add_recipes,
    add_inspect,
    add_compare,
    add_plan,
    add_build,
    add_import,
    add_train,
    add_evaluate,
    add_score,
    add_rescore,
    add_receipts,
    add_chat,
    add_demo,
    add_serve,
    add_export,
    add_data,
    add_microworld,
    add_probe,
    add_quickstart,
    add_study,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = whole_parser()
    given, dotted = _split(sys.argv[1:] if argv is None else argv)
    options, rest = parser.parse_known_args(given)
    options.overrides = [*dotted, *rest]
    try:
        _settle_rest(options)
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        print(f"commvlm: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("commvlm: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and options with a dot in their name, each with its value: keys of the recipe.

    Apart, so that such an option may stand anywhere, in front of the recipe as well.
    """
    own, dotted = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w[^\s=]*\.", word):
            own.append(word)
            continue
        dotted.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            dotted.append(words.pop(0))
    return own, dotted


def _settle_rest(options: argparse.Namespace) -> None:
    """What argparse could not place: keys of a recipe, or chat's question behind an option, which it overlooks there."""
    rest = options.overrides
    if options.command == "chat" and options.question is None and len(rest) == 1 and not rest[0].startswith("--"):
        options.question = rest.pop()
    if rest and not options.overridable:
        raise ValueError(f"unknown option {rest[0]!r} for {options.command}; see commvlm {options.command} --help")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def whole_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = Parser(
        prog="commvlm", description="COMM: several vision encoders, several layers each, read by a language model."
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"commvlm {version('commvlm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
