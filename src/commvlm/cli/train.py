"""train, quickstart: runs that learn."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import OVERRIDES, RECIPE, add_command, count, recipe_of


def add_train(commands: argparse._SubParsersAction) -> None:
    what = "train a recipe's stages; the same command resumes an interrupted run"
    example = "  commvlm microworld write world\n  commvlm train micro --out runs/first --data.root world\n" + OVERRIDES
    parser = add_command(commands, "train", _train, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--weights", default="checkpoint", choices=("checkpoint", "random"), help="random needs configs only"
    )


def _train(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from ..train.parallel import leave, speaks
    from ..train.run import train

    folder = train(recipe, options.out, weights=options.weights)
    if speaks():
        print(f"the model is in {folder}")
    leave()


def add_quickstart(commands: argparse._SubParsersAction) -> None:
    what = "train and evaluate COMM beside its controls on the micro world, and write the report (make demo)"
    parser = add_command(commands, "quickstart", _quickstart, what, "  commvlm quickstart --out runs/demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument("--jobs", type=count, default=2, help="runs side by side, one core each")


def _quickstart(options: argparse.Namespace) -> None:
    from ..app.quickstart import run_quickstart

    print(run_quickstart(options.out, jobs=options.jobs))
