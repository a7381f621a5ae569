"""score: anybody's predictions in the official file formats, offline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .command import add_command

if TYPE_CHECKING:
    from ..evaluate.official import Official

POPE = "  commvlm score pope --references coco_pope_random.json --predictions answers.jsonl --rule strict"
MME = "  commvlm score mme --predictions eval_tool/LaVIN"
VQA = "  commvlm score vqa --questions questions.json --annotations annotations.json --predictions results.json"
CAPTION = "  commvlm score caption --references captions_val2014.json --predictions results.json --json"
REC = (
    "  commvlm score rec --references REC_refcoco_unc_val.jsonl --predictions boxes.jsonl --rule shikra\n"
    "  commvlm score rec --references 'refs(unc).p' --instances instances.json --split testA --predictions boxes.jsonl"
)
REG = "  commvlm score reg --references 'refs(unc).p' --split testA --predictions expressions.json"

PAIR = ("references", "predictions")
BENCHMARKS = {
    "pope": (PAIR, "POPE's yes/no answers, JSON lines {question_id, answer}", POPE),
    "mme": (("predictions",), "a folder of MME's official result files", MME),
    "vqa": (("questions", "annotations", "predictions"), "VQAv2 or OK-VQA results [{question_id, answer}]", VQA),
    "caption": (PAIR, "COCO or Flickr30k captions [{image_id, caption}]; rule ptb needs the extra `caption`", CAPTION),
    "rec": (PAIR, "boxes of expressions, JSON lines {id, box} in pixels or {id, answer}", REC),
    "reg": (PAIR, "expressions of objects [{ref_id, sent}]; rule ptb needs the extra `caption`", REG),
}


def add_score(commands: argparse._SubParsersAction) -> None:
    what = "score a file of predictions in its official format, by the official rule or another one"
    group = add_command(commands, "score", lambda options: None, what, "\n".join((POPE, MME, VQA)))
    inner = group.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (files, said, example) in BENCHMARKS.items():
        parser = add_command(inner, name, _score, f"score {said}", example)
        for file in files:
            kind = "DIR" if name == "mme" else "FILE"
            parser.add_argument(f"--{file}", type=Path, required=True, metavar=kind, help=f"{kind.lower()} of {file}")
        parser.add_argument("--rule", help="another rule than the official one; an unknown one lists them")
        if name == "caption":
            parser.add_argument(
                "--subset", action="store_true", help="score the images that have a prediction, no others"
            )
        if name in ("rec", "reg"):
            parser.add_argument("--split", help="of refer's refs(unc).p, such as testA")
        if name == "rec":
            parser.add_argument(
                "--instances", type=Path, metavar="FILE", help="refer's instances.json, beside its refs"
            )
        parser.add_argument("--json", action="store_true", help="JSON on stdout")
        parser.add_argument("--receipt", type=Path, metavar="FILE", help="write a receipt of the score")
        parser.add_argument("--marks", type=Path, metavar="FILE", help="write what every item earned, by its id")


def _score(options: argparse.Namespace) -> None:
    from ..evaluate import official
    from ..evaluate.receipts import offline_receipt, write_json

    given = {name: getattr(options, name) for name in BENCHMARKS[options.benchmark][0]}
    chosen = {
        name: getattr(options, name)
        for name in ("rule", "subset", "split", "instances")
        if getattr(options, name, None)
    }
    found: Official = getattr(official, f"score_{options.benchmark}")(**given, **chosen)
    if options.marks is not None:
        write_json(dict(found.score.marks), options.marks)
    if options.receipt is not None:
        write_json(offline_receipt(found), options.receipt)
    print(json.dumps(found.figures, indent=1) if options.json else _table(options.benchmark, found))


def _table(benchmark: str, found: Official) -> str:
    """The figures one below the other, nested ones indented."""
    lines = [f"{benchmark}, rule {found.score.rule}"]
    if found.score.interval is not None:
        low, high = found.score.interval
        lines.append(
            f"  {found.score.metric} {found.score.value:.2f}, 95 % interval {low:.2f} to {high:.2f} over images"
        )
    return "\n".join([*lines, *_rows(found.figures, "  ")])


def _rows(figures: Mapping[str, object], indent: str) -> list[str]:
    lines = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_rows(value, indent + "  ")]
        else:
            lines.append(
                f"{indent}{name:<16} {value:.6f}" if isinstance(value, float) else f"{indent}{name:<16} {value}"
            )
    return lines
