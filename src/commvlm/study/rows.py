"""Rows: one visual half each, with the name by which tables, figures and claims know it.

A name says what the row is, whichever experiment asks for it; so a row that several of them need is trained once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..model import spec
from ..model.families import vision_half
from ..train.assemble import located
from ..train.recipe import Encoder, Model
from .settings import Scale, StudyEncoder

Pixels = Literal["given", "grey", "shuffled"]
Align = str | dict[str, Any]


@dataclass(frozen=True)
class Row:
    """name: its own in the whole study. model: what is trained. at: where it stands in figures, such as encoder and layer.
    pixels: what it sees, see `recipe.Data`."""

    name: str
    model: Model
    at: Mapping[str, str | int] = field(default_factory=dict)
    pixels: Pixels = "given"


def encoder(
    given: StudyEncoder, layers: Any, merge: str = "mean", *, align: Align | None = None, **changes: Any
) -> Encoder:
    """One branch of a row, aligned as the scale says unless told otherwise."""
    settled = {"name": given.name, "checkpoint": given.checkpoint, "image_size": given.image_size}
    aligned = given.align if align is None else align
    return Encoder(**{**settled, "weights": given.weights, **changes}, layers=layers, merge=merge, align=aligned)


def single(scale: Scale, given: StudyEncoder, layer: int) -> Row:
    """One encoder, one layer."""
    at = {"encoder": given.name, "layer": layer}
    return Row(single_name(given, layer), scale.model(encoder(given, layer)), at)


def single_name(given: StudyEncoder, layer: int) -> str:
    return f"{given.name} last" if layer == -1 else f"{given.name} {layer}"


def merged(scale: Scale, given: StudyEncoder, merge: str, layers: Any) -> Row:
    """One encoder, several layers under one merge."""
    at = {"encoder": given.name, "merge": merge, "layers": str(layers)}
    return Row(merged_name(given, merge, layers), scale.model(encoder(given, layers, merge)), at)


def merged_name(given: StudyEncoder, merge: str, layers: Any) -> str:
    return f"{given.name} {merge} {layers}"


def mfm(scale: Scale, given: StudyEncoder) -> Row:
    """The paper's "+ MFM": LLN-Layerscale over the layers that the scale gives this encoder."""
    return merged(scale, given, "lln-layerscale", given.merged)


def pair(scale: Scale) -> tuple[StudyEncoder, StudyEncoder]:
    """COMM's two encoders, the text-supervised one first."""
    first, second = (scale.encoder(name) for name in scale.pair)
    return first, second


def depth_of(given: StudyEncoder) -> int | None:
    """Blocks of an encoder. None where that cannot be read: its rows keep the layers that were asked for, and what is wrong
    is told where they are built."""
    try:
        return spec.depth_of(located(given.checkpoint))
    except ValueError:
        return None


def layers_for(scale: Scale, given: StudyEncoder, layers: Sequence[int]) -> list[int]:
    """The scale's layers, the pair's first encoder's, in this one: at the same share of its depth, ascending."""
    first, _ = pair(scale)
    whole, own = depth_of(first), depth_of(given)
    if whole is None or own is None:
        return sorted(layers)
    return sorted({max(1, round(layer * own / whole)) for layer in layers})


def is_dino(config: Any) -> bool:
    """Whether an encoder's config is of the family that the paper takes for vision-only."""
    return vision_half(config).model_type.startswith("dino")


def comm(scale: Scale, name: str = "COMM", *, pixels: Pixels = "given", **second_changes: Any) -> Row:
    """COMM: both merged, the vision-only one aligned by its MLP, concatenated."""
    first, second = pair(scale)
    branches = (
        encoder(first, first.merged, "lln-layerscale"),
        encoder(second, second.merged, "lln-layerscale", **second_changes),
    )
    return Row(name, scale.model(*branches), {"encoder": " + ".join(scale.pair)}, pixels)
