"""evaluate: answers and scores."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .command import OVERRIDES, add_command


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    what = "ask a trained run its recipe's questions, keep the answers, score them"
    example = "  commvlm evaluate runs/first\n  commvlm evaluate runs/first --tasks rec,pope\n" + OVERRIDES
    parser = add_command(commands, "evaluate", _evaluate, what, example, overridable=True)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a folder made by commvlm train")
    parser.add_argument("--tasks", default="", help="comma-separated; all that the recipe names by default")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _evaluate(options: argparse.Namespace) -> None:
    from ..app.evaluation import evaluate_run
    from ..evaluate.scores import scores_table

    tasks = tuple(name.strip() for name in options.tasks.split(",") if name.strip())
    scores = evaluate_run(options.run_folder, tasks=tasks, overrides=options.overrides)
    if options.json:
        print(json.dumps({name: score.as_json() for name, score in scores.items()}, indent=1))
    else:
        print(scores_table({options.run_folder.name: scores}))
