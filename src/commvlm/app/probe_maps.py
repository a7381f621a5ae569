"""Similarity and principal-component maps as one PNG: a row for each encoder, a column for each layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..data.example import Point
from ..model.frozen import FrozenEncoder
from ..probe.maps import layer_tokens, patch_at, principal, shares, similarity, view_of
from .charts import STYLE

PALETTE = "cividis"
"""Reads the same with every kind of colour vision, and in grey."""


def draw_maps(
    image: Image.Image,
    sources: Sequence[tuple[FrozenEncoder, Sequence[int]]],
    out: Path,
    *,
    at: Point | None = None,
    side: int = 300,
) -> Path:
    """Writes the PNG and returns its path.

    sources: encoders and the layers that are shown of each. at: a point in pixels of the image, whose patch's token is
    compared with all others by cosine (the paper's Figure 1); without one, each layer's first three principal components are
    red, green and blue.

    Raises ValueError for a point beyond the image.
    """
    marks = [None if at is None else patch_at(at, view_of(image, source), source.grid) for source, _ in sources]
    columns = 1 + max(len(layers) for _, layers in sources)
    inch = side / 100
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(inch * columns, (inch + 0.3) * len(sources)), dpi=100, layout="constrained")
        panels = figure.subplots(len(sources), columns, squeeze=False)
        for row, (source, layers), patch in zip(panels, sources, marks, strict=True):
            for panel in row:
                panel.set_axis_off()
            _shown(row[0], source, image, patch)
            tokens = layer_tokens(source, image)
            for panel, layer in zip(row[1:], layers, strict=False):
                panel.set_title(f"{source.name}, layer {layer}", fontsize=10)
                _map(panel, tokens[layer], source, patch)
        if at is not None:
            said = "cosine, low to high"
            figure.colorbar(_scale(), ax=panels, fraction=0.03, label=said, ticks=[])
        part = out.with_suffix(".part")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, out)
    return out


def _scale() -> ScalarMappable:
    return ScalarMappable(Normalize(0, 1), PALETTE)


def _shown(panel: Axes, source: FrozenEncoder, image: Image.Image, patch: int | None) -> None:
    """What the encoder is shown, the patch marked."""
    rows, columns = source.grid
    panel.set_title("shown", fontsize=10)
    panel.imshow(source.images.shown(image), extent=(0, columns, rows, 0), interpolation="nearest")
    if patch is not None:
        _mark(panel, patch, columns)


def _map(panel: Axes, tokens: Tensor, source: FrozenEncoder, patch: int | None) -> None:
    rows, columns = source.grid
    if patch is None:
        panel.imshow(
            shares(principal(tokens), source.grid).numpy(), extent=(0, columns, rows, 0), interpolation="nearest"
        )
        return
    cosines = similarity(tokens, patch)
    others = torch.cat([cosines[:patch], cosines[patch + 1 :]])  # its own is 1, and would take the whole scale
    panel.imshow(
        shares(cosines, source.grid).numpy(), cmap=PALETTE, vmin=float(others.min()), vmax=float(others.max()),
        extent=(0, columns, rows, 0), interpolation="nearest",
    )  # fmt: skip
    panel.set_xlabel("")
    panel.text(
        0, rows * 1.02, f"{float(others.min()):.2f} to {float(others.max()):.2f}", fontsize=8, va="top", color="#5a5a5a"
    )
    _mark(panel, patch, columns)


def _mark(panel: Axes, patch: int, columns: int) -> None:
    y, x = divmod(patch, columns)
    for color, width in (("black", 3.5), ("white", 1.5)):
        panel.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color=color, linewidth=width)
