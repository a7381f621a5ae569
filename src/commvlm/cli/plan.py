"""plan: what a training run costs, before it is paid."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from .command import OVERRIDES, RECIPE, add_command, count, recipe_of

if TYPE_CHECKING:
    from ..app.planning import Planner, StagePlan


def add_plan(commands: argparse._SubParsersAction) -> None:
    what = "memory of a training run part by part and hours of every stage, counted before it starts; refuses what cannot fit"
    example = (
        "  commvlm plan comm-7b --gpu h200 --gpus 8 --train.engine fsdp\n"
        "  commvlm plan comm-7b --gpu 4090 --train.checkpointing true --train.stages.stage1.lora.rank 16\n"
        "  commvlm plan micro --gpu cpu --json\n"
        "A recipe that cannot fit gives exit code 2, and what would make it fit.\n"
    ) + OVERRIDES
    parser = add_command(commands, "plan", _plan, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument(
        "--gpu", default="h100", help="a100-80, a800-80, h100, h200, l40s, 4090, ..., or cpu: this machine (h100)"
    )
    parser.add_argument("--gpus", type=count, default=1, help="how many, each a process (1)")
    parser.add_argument("--efficiency", type=_share, help="share of the GPU's peak that is reached (0.4)")
    parser.add_argument("--front", type=count, default=40, help="tokens of text before a row's questions (40)")
    parser.add_argument("--words", type=count, default=60, help="tokens of a question with its answer (60)")
    parser.add_argument("--answer", type=count, default=20, help="of these, supervised ones (20)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _share(text: str) -> float:
    """A number over 0, at most 1."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number over 0, at most 1")
    return share


def _plan(options: argparse.Namespace) -> int:
    recipe = recipe_of(options)
    if not recipe.train.stages:
        raise ValueError(f"{recipe.name} has no train.stages: there is nothing to plan")
    from rich.console import Console

    from ..app.planning import Planner, Text, machine, remedies

    if options.answer > options.words:
        raise ValueError(f"--answer {options.answer} is more than --words {options.words}, of which it is a part")
    text = Text(options.front, options.words, options.answer)
    with Console(stderr=True).status("counting a training step"):
        planner = Planner(recipe, machine(options.gpu, options.gpus, options.efficiency), text)
        plans = [planner.plan(stage) for stage in recipe.train.stages]
        over = next((plan for plan in plans if plan.memory.total > planner.on.memory), None)
        ways = [] if over is None else remedies(planner, over.stage)
    if options.json:
        print(json.dumps(_as_json(planner, plans, ways), indent=1))
    else:
        print(_table(planner, plans))
    if over is None:
        return 0
    needs, has = over.memory.total / 1e9, planner.on.memory / 1e9
    print(
        f"commvlm: error: stage {over.stage.name!r} needs {needs:.1f} GB of {has:.1f} GB on each {planner.on.name}; it cannot fit",
        file=sys.stderr,
    )
    for says, left in ways:
        fits = f"fits, {left / 1e9:.1f} GB left" if left >= 0 else f"still {-left / 1e9:.1f} GB too much"
        print(f"  {says}: {fits}", file=sys.stderr)
    return 2


def _as_json(planner: Planner, plans: list[StagePlan], ways: list[tuple[str, int]]) -> dict[str, Any]:
    from ..app.planning import paper_hours

    return {
        "recipe": planner.recipe.name,
        "machine": dataclasses.asdict(planner.on),
        "text": dataclasses.asdict(planner.text),
        "stages": [
            {
                "stage": plan.stage.name,
                "memory": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
                "fits": plan.memory.total <= planner.on.memory,
                "micro_batch": plan.micro,
                "accumulated": plan.accumulated,
                "flops_of_an_update": plan.flops,
                "hours": plan.hours,
                "paper_hours": paper_hours(planner, plan),
            }
            for plan in plans
        ],
        "would_change": [{"setting": says, "bytes_left": left} for says, left in ways],
    }


def _table(planner: Planner, plans: list[StagePlan]) -> str:
    from ..app.planning import ASSUMED, paper_hours

    on, text, train = planner.on, planner.text, planner.recipe.train
    head = (
        f"{planner.recipe.name} on {on.count} x {on.name}: {train.engine if on.count > 1 else 'one process'}, {train.precision}"
        f"{', checkpointing' if train.checkpointing else ''}; GB of one process when it holds most"
    )
    parts = [field.name for field in dataclasses.fields(plans[0].memory)]
    lines = [head, f"{'':<14}" + "".join(f"{plan.stage.name:>14}" for plan in plans)]
    for part in [*parts, "total"]:
        lines.append(f"{part:<14}" + "".join(f"{getattr(plan.memory, part) / 1e9:>14.2f}" for plan in plans))
    lines.append(f"{'of':<14}" + f"{on.memory / 1e9:>14.2f}" * len(plans))
    lines.append(f"{'images at once':<14}" + "".join(f"{f'{p.micro} x {p.accumulated}':>14}" for p in plans))
    lines.append(f"{'TFLOPs/update':<14}" + "".join(f"{plan.flops / 1e12:>14.4g}" for plan in plans))
    lines.append(f"{'hours':<14}" + "".join(f"{plan.hours:>14.3g}" for plan in plans))
    stated = [paper_hours(planner, plan) for plan in plans]
    if any(hours is not None for hours in stated):
        lines.append(f"{'the paper':<14}" + "".join(f"{hours or float('nan'):>14.3g}" for hours in stated))
        reached = [
            on.efficiency * plan.hours / hours if hours else float("nan")
            for plan, hours in zip(plans, stated, strict=True)
        ]
        lines.append(
            f"{'its share':<14}"
            + "".join(f"{share:>14.0%}" for share in reached)
            + "  of the peak, for the counted FLOPs"
        )
    lines.append(
        ASSUMED.format(
            efficiency=on.efficiency, peak=on.peak / 1e12, text=text.front, words=text.words, answer=text.answer
        )
    )
    return "\n".join(lines)
