"""recipes, inspect, compare, build, import: models and where they come from."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import OVERRIDES, RECIPE, add_command, count, recipe_of

if TYPE_CHECKING:
    from ..model.config import CommConfig


def add_recipes(commands: argparse._SubParsersAction) -> None:
    what = "the recipes that come with the package, each with what it is"
    add_command(commands, "recipes", _recipes, what, "  commvlm recipes\n  commvlm inspect peers/llava-1.5-7b")


def _recipes(options: argparse.Namespace) -> None:
    from ..train.recipe import shipped_recipes

    for name, about in shipped_recipes().items():
        print(textwrap.fill(about, 100, initial_indent=f"{name}\n    ", subsequent_indent="    "))


def add_inspect(commands: argparse._SubParsersAction) -> None:
    what = "parameters, layers, grid, visual tokens and FLOPs of a recipe, part by part; nothing is allocated"
    example = (
        "  commvlm inspect recipes/comm-7b.yaml\n  commvlm inspect micro --json\n"
        "  commvlm inspect micro --measure                    (latency and peak memory of its visual half, too)\n"
    ) + OVERRIDES
    parser = add_command(commands, "inspect", _inspect, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--measure", action="store_true", help="run its visual half with random weights, bf16, 3 times")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def add_compare(commands: argparse._SubParsersAction) -> None:
    what = "parameters, FLOPs, visual tokens, latency and peak memory of several recipes' visual halves, side by side"
    example = (
        "  commvlm compare comm-7b peers/llava-1.5-7b controls/clip-h-mfm-7b\n"
        "  commvlm compare micro mine.yaml --runs 20 --dtype fp32 --json\n"
        "  commvlm compare comm-7b comm-13b --no-measure          (counts alone; nothing is allocated)"
    )
    parser = add_command(commands, "compare", _compare, what, example)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=RECIPE)
    parser.add_argument("--runs", type=count, default=3, help="measured forward passes of each (3)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of weights and pixels (bf16)")
    parser.add_argument("--no-measure", action="store_true", help="counts alone; nothing is allocated")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _compare(options: argparse.Namespace) -> None:
    from ..train.recipe import load_recipe

    recipes = [load_recipe(name) for name in options.recipes]
    from ..app.comparison import compare_recipes, comparison_table

    rows = compare_recipes(recipes, runs=0 if options.no_measure else options.runs, dtype=options.dtype)
    print(json.dumps(rows, indent=1) if options.json else comparison_table(rows))


def _inspect(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from ..model.cost import as_json, as_table, inspect_model
    from ..model.spec import build_config
    from ..train.assemble import model_settings

    config = build_config(**model_settings(recipe.model))
    trains = recipe.train.stages[-1].trains if recipe.train.stages else {}
    rows = inspect_model(config, **({"trains": tuple(trains)} if trains else {}))
    took = _measured(config) if options.measure else None
    if options.json:
        print(json.dumps(as_json(rows) + ([{"part": "measured", **took}] if took else []), indent=1))
        return
    print(as_table(rows))
    if took:
        print(
            f"visual half: {1e3 * took['seconds']:,.1f} ms an image, {took['peak_bytes'] / 1e6:,.1f} MB held at most beside "
            f"the weights (median of {took['runs']}, {took['dtype']}, {took['device']}, {took['threads']} threads)"
        )


def _measured(config: CommConfig) -> dict[str, Any]:
    from rich.console import Console

    from ..model.measure import measure

    with Console(stderr=True).status("measuring the visual half"):
        return dataclasses.asdict(measure(config))


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
        "--weights",
        default="checkpoint",
        choices=("checkpoint", "random"),
        help="random needs configs and the tokenizer",
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


def add_import(commands: argparse._SubParsersAction) -> None:
    what = (
        "turn a peer's trained checkpoint into one of ours: the same answers, read, evaluated and studied as any other"
    )
    example = (
        "  commvlm import llava llava-hf/llava-1.5-7b-hf --out llava-1.5-7b\n"
        "  commvlm import shikra shikra-7b --vision openai/clip-vit-large-patch14 --out shikra-7b-ours"
    )
    parser = add_command(commands, "import", _import, what, example)
    parser.add_argument(
        "kind", choices=("llava", "shikra"), help="llava: the library's format; shikra: with its delta added"
    )
    parser.add_argument("path", help="llava: hub id or folder; shikra: folder; weights as safetensors")
    parser.add_argument("--vision", help="shikra's CLIP, by hub id or folder; the one that it names by default")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")


def _import(options: argparse.Namespace) -> None:
    from ..app.importing import import_checkpoint

    model = import_checkpoint(options.kind, options.path, options.out, vision=options.vision)
    total = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {total:,} parameters, {model.config.num_image_tokens} visual tokens an image")
