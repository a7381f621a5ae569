"""evaluate: answers and scores."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .command import OVERRIDES, add_command


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    what = "ask a checkpoint a recipe's questions, keep the answers, score them, write receipts"
    example = (
        "  commvlm evaluate runs/first\n"
        "  commvlm evaluate runs/first --tasks rec,reg,pope,vqa,caption,mme --evaluate.rules.caption ptb\n"
        "  commvlm evaluate runs/first --tasks rec --evaluate.knock_out dinov2       (into runs/first/without-dinov2)\n"
        "  commvlm evaluate llava-1.5-7b-hf --recipe micro --data.root world --out runs/llava\n"
        "  torchrun --nproc-per-node 8 -m commvlm.cli evaluate runs/comm-7b\n" + OVERRIDES
    )
    parser = add_command(commands, "evaluate", _evaluate, what, example, overridable=True)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a run's folder, a saved model's, or another VLM's"
    )
    parser.add_argument("--tasks", default="", help="comma-separated; all that the recipe names by default")
    parser.add_argument("--recipe", help="whose questions are asked; a run's own by default")
    parser.add_argument("--out", type=Path, help="folder of predictions, scores, receipts; the checkpoint's by default")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _evaluate(options: argparse.Namespace) -> None:
    from ..app.evaluation import evaluate
    from ..evaluate.scores import scores_table

    tasks = tuple(name.strip() for name in options.tasks.split(",") if name.strip())
    scores = evaluate(
        options.checkpoint, tasks=tasks, overrides=options.overrides, recipe=options.recipe, out=options.out
    )
    if not scores:  # another rank than the first, or nothing that can be scored
        return
    if options.json:
        print(json.dumps({name: score.as_json() for name, score in scores.items()}, indent=1))
    else:
        print(scores_table({options.checkpoint.name: scores}))
