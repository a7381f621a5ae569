"""inspect, build: a recipe's model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .command import OVERRIDES, RECIPE, add_command, recipe_of


def add_inspect(commands: argparse._SubParsersAction) -> None:
    what = "parameters, layers, grid, visual tokens and FLOPs of a recipe, part by part; nothing is allocated"
    example = "  commvlm inspect recipes/comm-7b.yaml\n  commvlm inspect micro --json\n" + OVERRIDES
    parser = add_command(commands, "inspect", _inspect, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _inspect(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from ..model.cost import as_json, as_table, inspect_model
    from ..model.spec import build_config
    from ..train.assemble import model_settings

    config = build_config(**model_settings(recipe.model))
    trains = recipe.train.stages[-1].trains if recipe.train.stages else {}
    rows = inspect_model(config, **({"trains": tuple(trains)} if trains else {}))
    print(json.dumps(as_json(rows), indent=1) if options.json else as_table(rows))


def add_build(commands: argparse._SubParsersAction) -> None:
    what = "assemble a recipe's model from its checkpoints and save it as a transformers checkpoint"
    example = (
        "  commvlm build recipes/comm-7b.yaml --out comm-7b-start\n"
        "  commvlm build micro --weights random --out start\n" + OVERRIDES
    )
    parser = add_command(commands, "build", _build, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--weights", default="checkpoint", choices=("checkpoint", "random"), help="random needs configs only"
    )


def _build(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    if options.out.exists():
        raise ValueError(f"{options.out} exists: choose another --out")
    from ..train.assemble import assemble
    from ..train.whole import save_whole

    model, processor = assemble(recipe.model, weights=options.weights, seed=recipe.train.seed)
    save_whole(options.out, model, processor)
    total = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {total:,} parameters, {model.config.num_image_tokens} visual tokens an image")
