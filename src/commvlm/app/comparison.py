"""Recipes side by side: what each visual half has, needs and takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import track

from ..model.cost import Row, inspect_model
from ..model.measure import measure
from ..model.spec import build_config
from ..train.assemble import model_settings
from ..train.recipe import Recipe

COLUMNS = (
    ("recipe", "{:<32}"), ("tokens", "{:>7}"), ("encoders M", "{:>11}"), ("added M", "{:>9}"), ("total M", "{:>9}"),
    ("encoders GF", "{:>12}"), ("added GF", "{:>9}"), ("LM GF", "{:>9}"), ("ms", "{:>9}"), ("peak MB", "{:>8}"),
)  # fmt: skip


def compare_recipes(recipes: Sequence[Recipe], *, runs: int, dtype: str) -> list[dict[str, Any]]:
    """One row per recipe. runs: measured forward passes of each; 0 measures nothing, and then nothing is allocated.

    parameters and flops are by part (encoders; added: merge, align, fuse and projection; language_model), flops of one
    image's forward pass, the language model's of reading the visual tokens alone.
    """
    configs = [build_config(**model_settings(recipe.model)) for recipe in recipes]  # all are checked before any is run
    rows = []
    pairs = list(zip(recipes, configs, strict=True))
    said = "measuring" if runs else "counting"
    for recipe, config in track(pairs, said, console=Console(stderr=True), transient=True):
        parts = inspect_model(config)
        rows.append(
            {
                "recipe": recipe.name,
                "tokens": config.num_image_tokens,
                "parameters": _by_part(parts, "parameters"),
                "flops": _by_part(parts, "flops"),
                "measured": asdict(measure(config, runs=runs, dtype=dtype)) if runs else None,
            }
        )
    return rows


def _by_part(parts: Sequence[Row], field: str) -> dict[str, int]:
    sums = {"encoders": 0, "added": 0, "language_model": 0}
    for row in parts:
        if row.part != "total":
            sums[row.part if row.part in sums else "added"] += getattr(row, field)
    return sums


def _mega(value: int) -> str:
    return f"{value / 1e6:,.1f}"


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people: millions of parameters, billions of FLOPs, milliseconds and megabytes of one image."""
    lines = ["".join(form.format(name) for name, form in COLUMNS).rstrip()]
    for row in rows:
        parameters, flops, measured = row["parameters"], row["flops"], row["measured"]
        cells = [
            row["recipe"], row["tokens"], *(_mega(parameters[part]) for part in ("encoders", "added")),
            f"{sum(parameters.values()) / 1e6:,.0f}",
            *(f"{flops[part] / 1e9:,.1f}" for part in ("encoders", "added", "language_model")),
            *(("", "") if measured is None else (f"{1e3 * measured['seconds']:,.0f}", _mega(measured["peak_bytes"]))),
        ]  # fmt: skip
        lines.append("".join(form.format(cell) for cell, (_, form) in zip(cells, COLUMNS, strict=True)).rstrip())
    some = next((row["measured"] for row in rows if row["measured"]), None)
    if some is not None:
        lines.append(
            f"\nms: median of {some['runs']} passes of one image through the visual half, random weights, {some['dtype']}, "
            f"{some['device']}, {some['threads']} threads. peak MB: tensors held at most beside the weights."
        )
    return "\n".join(lines)
