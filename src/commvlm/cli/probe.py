"""probe: what frozen encoders give, layer by layer, before anything is trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import OVERRIDES, RECIPE, add_command, count, recipe_of


def add_probe(commands: argparse._SubParsersAction) -> None:
    what = "read frozen encoders, layer by layer, before a language model is trained on them"
    example = "  commvlm probe features micro --data.root world --out features --layers all"
    group = add_command(commands, "probe", lambda options: None, what, example, overridable=True)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_features(inner)


def _add_features(inner: argparse._SubParsersAction) -> None:
    parser = add_command(
        inner, "features", _features,
        "a recipe's encoders on its training images, once, into a store that training reads; resumes",
        "  commvlm probe features micro --data.root world --out features --layers all\n"
        "  commvlm train micro --data.root world --out runs/first --train.features features\n" + OVERRIDES,
        overridable=True,
    )  # fmt: skip
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the stores, one for each encoder")
    parser.add_argument("--layers", help="of every encoder, such as all; those that the recipe asks for by default")
    parser.add_argument("--kept", default="bf16", choices=("fp32", "bf16", "int8"), help="how values are kept (bf16)")
    parser.add_argument("--batch", type=count, default=32, help="images encoded at once (32)")


def _features(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from ..train.features import store_recipe

    layers = [entry.strip() for entry in options.layers.split(",")] if options.layers else None
    stores = store_recipe(recipe, options.out, layers=layers, kept=options.kept, batch=options.batch)
    for store in stores.values():
        size = sum(shard.stat().st_size for shard in store.folder.glob("shard-*.safetensors"))
        print(f"{store.folder}: {len(store):,} images, layers {list(store.layers)}, {size / 1e6:,.1f} MB")
