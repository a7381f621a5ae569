"""What a model costs, part by part, from its config alone: nothing is allocated, everything runs on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .config import CommConfig, CommVisionConfig
from .families import family_of
from .layers import describe_layers
from .modeling import PARTS, CommForConditionalGeneration
from .names import lookup
from .tokens import Tokens
from .vision import CommVisionModel

TRAINED = ("merge", "align", "project", "language_model")
"""What the paper trains, in both stages."""


@dataclass(frozen=True)
class Row:
    """One part of a model.

    part: one of `modeling.PARTS`, or "total". encoder: its encoder's name, "" for shared parts. parameters, trained:
    counts. flops: of one image's forward pass; a multiplication and an addition are two. The language model's are those
    of reading the visual tokens alone, without its head. layers, grid, tokens: layers read, rows and columns of patch
    tokens, tokens given on; empty where they do not apply.
    """

    part: str
    encoder: str
    parameters: int
    trained: int
    flops: int
    layers: str = ""
    grid: tuple[int, int] | None = None
    tokens: int | None = None


def inspect_model(config: CommConfig, *, trains: Sequence[str] = TRAINED) -> list[Row]:
    """One row per part of each branch, the shared parts, and their total.

    trains: the parts that a recipe trains. Raises ValueError for a name that is no part.
    """
    for part in trains:
        lookup(dict.fromkeys(PARTS), part, what="part")
    with torch.device("meta"):
        model = CommForConditionalGeneration._from_config(config).eval()
        rows = [*_visual_rows(model, trains), _language_row(model, trains)]
    total = Row(
        "total",
        "",
        sum(row.parameters for row in rows),
        sum(row.trained for row in rows),
        sum(row.flops for row in rows),
        grid=config.vision_config.grid,  # type: ignore[union-attr]
        tokens=config.num_image_tokens,
    )
    return [*rows, total]


def inspect_visual_half(config: CommConfig) -> list[Row]:
    """Of `inspect_model`, the rows of encoders, branches and projection: much sooner where the language model is large."""
    with torch.device("meta"):
        return _visual_rows(CommForConditionalGeneration._from_config(config).eval(), TRAINED)


def visual_flops(config: CommVisionConfig) -> int:
    """FLOPs of one image through encoders, branches and fuse."""
    with torch.device("meta"):
        model = CommVisionModel(config).eval()
        pixels = torch.empty(1, config.pixels_per_image)
    with FlopCounterMode(display=False) as counter:
        model(pixels)
    return counter.get_total_flops()


def _visual_rows(model: CommForConditionalGeneration, trains: Sequence[str]) -> list[Row]:
    vision: Any = model.model.vision_tower
    rows = [row for name in vision.config.names for row in _branch_rows(model, name, trains)]
    return [*rows, _project_row(model, trains)]


def _branch_rows(model: CommForConditionalGeneration, name: str, trains: Sequence[str]) -> list[Row]:
    """Encoder, merge and align of one branch."""
    vision: Any = model.model.vision_tower
    setting = next(branch for branch in vision.config.branches if branch["name"] == name)
    encoder, branch = vision.encoder(name), vision.branches[name]
    family = family_of(encoder.config)
    size, layers = setting["image_size"], setting["layers"]
    patches = Tokens.of(vision.config.grid_of(name), family.width(encoder.config))
    merged = branch.merge.out
    pixels = family.inputs(torch.empty(1, 3, size, size), encoder.config)
    states = [torch.empty(1, patches.count, patches.dim)] * len(layers)
    tokens = torch.empty(1, merged.count, merged.dim)
    read = f"{describe_layers(layers)} of {setting['depth']}"
    return [
        _row("encoders", name, [encoder], lambda: encoder(**pixels, **family.call), trains, read, patches),
        _row("merge", name, [branch.merge], lambda: branch.merge(states), trains, read, merged),
        _row("align", name, [branch.align], lambda: branch.finish(tokens), trains, "", branch.out),
    ]


def _project_row(model: CommForConditionalGeneration, trains: Sequence[str]) -> Row:
    """Fuse, reduction and projection as one part."""
    vision: Any = model.model.vision_tower
    tokens = [torch.empty(1, given.count, given.dim) for given in vision.fuse.given]
    project = model.model.multi_modal_projector

    def join() -> None:
        project(vision.reduce(vision.fuse(tokens)))

    return _row("project", "", [vision.fuse, project, model.model.image_frame], join, trains, "", vision.reduce.out)


def _language_row(model: CommForConditionalGeneration, trains: Sequence[str]) -> Row:
    config: Any = model.config
    embeds = torch.empty(1, config.num_image_tokens, config.text_config.hidden_size)
    language_model = model.model.language_model
    look = torch.ones(1, 1, embeds.shape[1], embeds.shape[1], dtype=torch.bool)

    def read() -> None:
        language_model(inputs_embeds=embeds, attention_mask=look, use_cache=False)

    return _row("language_model", "", [language_model, model.lm_head], read, trains, "", None)


def _row(
    part: str,
    encoder: str,
    modules: Sequence[nn.Module],
    run: Callable[[], Any],
    trains: Sequence[str],
    layers: str,
    tokens: Tokens | None,
) -> Row:
    parameters = sum(p.numel() for p in nn.ModuleList(modules).parameters())
    with FlopCounterMode(display=False) as counter:
        run()
    return Row(
        part,
        encoder,
        parameters,
        parameters if part in trains else 0,
        counter.get_total_flops(),
        layers,
        None if tokens is None else tokens.grid,
        None if tokens is None else tokens.count,
    )


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]


def as_table(rows: Sequence[Row]) -> str:
    """The rows for people: counts in full, FLOPs in billions."""
    lines = [
        f"{'part':<16}{'encoder':<10}{'parameters':>16}{'trained':>16}{'GFLOPs':>12}  {'grid':<9}{'tokens':>6}  layers"
    ]
    for row in rows:
        grid = "" if row.grid is None else f"{row.grid[0]} x {row.grid[1]}"
        tokens = "" if row.tokens is None else str(row.tokens)
        lines.append(
            f"{row.part:<16}{row.encoder:<10}{row.parameters:>16,}{row.trained:>16,}{row.flops / 1e9:>12,.2f}"
            f"  {grid:<9}{tokens:>6}  {row.layers}".rstrip()
        )
    return "\n".join(lines)
