"""receipts, rescore: why two scores differ, and one file of answers under every rule."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .command import add_command


def add_receipts(commands: argparse._SubParsersAction) -> None:
    what = "receipts of scores: what they were made of, and why two differ"
    example = "  commvlm receipts diff runs/a/receipts/pope.json runs/b/receipts/pope.json"
    group = add_command(commands, "receipts", lambda options: None, what, example)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    diff = add_command(inner, "diff", _diff, "say in words why two scores differ", example)
    diff.add_argument("a", type=Path, metavar="A", help="a receipt")
    diff.add_argument("b", type=Path, metavar="B", help="another one")
    diff.add_argument("--json", action="store_true", help="JSON on stdout")


def add_rescore(commands: argparse._SubParsersAction) -> None:
    what = "score a file of predictions again, by other rules, and show where the points go"
    example = (
        "  commvlm rescore runs/first/predictions/pope.jsonl --all-rules\n"
        "  commvlm rescore runs/first/predictions/vqa.jsonl --rule evalai --json"
    )
    parser = add_command(commands, "rescore", _rescore, what, example)
    parser.add_argument("predictions", type=Path, metavar="PRED", help="a predictions file of commvlm evaluate")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all-rules", action="store_true", help="every rule beside the default one, with examples")
    which.add_argument("--rule", help="one rule; an unknown one lists them")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _diff(options: argparse.Namespace) -> None:
    from ..evaluate.differences import differences
    from ..evaluate.receipts import read_receipt

    said = differences(read_receipt(options.a), read_receipt(options.b))
    print(json.dumps(said, indent=1) if options.json else "\n".join(f"- {sentence}" for sentence in said))


def _rescore(options: argparse.Namespace) -> None:
    if options.all_rules:
        _all_rules(options)
        return
    from ..evaluate.run import score
    from ..evaluate.scores import scores_table
    from ..evaluate.tasks import TASKS

    chosen = {name: str(options.rule) for name, task in TASKS.items() if options.rule in task.rules}
    scores = score(options.predictions, rules=chosen)
    if options.rule is not None and not chosen.keys() & scores.keys():
        known = dict.fromkeys(rule for name in scores for rule in TASKS[name].rules)
        raise ValueError(
            f"no task of {options.predictions} has a rule {options.rule!r}: choose one of {', '.join(known)}"
        )
    if options.json:
        print(json.dumps({name: found.as_json() for name, found in scores.items()}, indent=1))
    else:
        print(scores_table({options.predictions.stem: scores}))


def _all_rules(options: argparse.Namespace) -> None:
    from ..evaluate.rescore import rescore, rescored_table

    found = rescore(options.predictions)
    if not options.json:
        print(rescored_table(found))
        return
    rows = [
        {
            "task": entry.task, "rule": entry.rule, "value": None if entry.score is None else entry.score.value,
            "gained": [id for id, *_ in entry.gained], "lost": [id for id, *_ in entry.lost], "why": entry.why,
        }
        for entry in found
    ]  # fmt: skip
    print(json.dumps(rows, indent=1))
