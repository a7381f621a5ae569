"""What every command shares: its parser, its recipe, and how a slip is told."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ..train.recipe import Recipe


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"commvlm: error: {message}; see {self.prog} --help\n")


def count(text: str) -> int:
    """A number from 1."""
    if not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few, at least 1")
    return int(text)


def mapping(text: str, option: str) -> dict[str, Any]:
    """A mapping written as YAML. Raises ValueError naming the option."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{option} {text!r} is no mapping such as '{{timeout_min: 1440}}'")
    return found


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], object],
    what: str,
    example: str,
    overridable: bool = False,
) -> argparse.ArgumentParser:
    """A command's parser. run: called with the parsed options. overridable: any key of its recipe is an option, too."""
    parser = commands.add_parser(
        name, help=what, description=what, epilog=f"examples:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.set_defaults(run=run, overridable=overridable)
    return parser


RECIPE = "a YAML file, or a shipped recipe's name"
OVERRIDES = "  any key of the recipe is an option: --train.seed 1 --data.root DIR"


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The command's recipe. Read before torch is imported: a slip is answered at once."""
    from ..train.recipe import load_recipe

    return load_recipe(options.recipe, options.overrides)
