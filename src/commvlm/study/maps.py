"""Figure 1: what one patch's token finds alike in its image, every encoder of the scale side by side. Nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..app.probe_maps import draw_maps
from ..app.probing import shown_layers
from ..data.example import Example
from ..data.images import open_image
from ..evaluate.receipts import fingerprint
from ..model.frozen import open_frozen
from ..model.storage import write_text
from ..train.assemble import encoder_spec
from ..train.sources import examples_of
from .rows import encoder
from .runs import weights_hash
from .settings import Scale

IMAGES = 2
SIDE = 220
"""Pixels of a map's side."""


def draw_figure_1(scale: Scale, data: Path, folder: Path) -> None:
    """figure-1-1.png, figure-1-2.png in `folder`: the first two images that REC asks about, at the centre of the box that is
    asked for. What is there of the same encoders and images stays. Raises ValueError where no question of the scale's
    recipe is about a box."""
    targets = [folder / f"figure-1-{k + 1}.png" for k in range(IMAGES)]
    asked = _asked(scale, data)
    if not asked:
        raise ValueError(
            f"scale {scale.name}: none of evaluate.sources asks for a box, so Figure 1 has no object to look at"
        )
    shown = [f"{fingerprint(e.image)['sha256']} {e.turns[0].answer_boxes}" for e in asked if e.image is not None]
    drawn = [f"{e} {weights_hash(e.checkpoint)}" for e in scale.encoders]
    of, said = folder / "figure-1.txt", "\n".join([*drawn, str(scale.base.model.pad_color), *shown])
    if of.is_file() and of.read_text(encoding="utf-8") == said and all(t.is_file() for t in targets[: len(asked)]):
        return
    for target in targets:
        target.unlink(missing_ok=True)
    sources = [
        open_frozen(encoder_spec(encoder(given, "all")), pad_color=scale.base.model.pad_color)
        for given in scale.encoders
    ]
    places = [(source, shown_layers(source)) for source in sources]
    for target, example in zip(targets, asked, strict=False):
        x1, y1, x2, y2 = example.turns[0].answer_boxes[0][0]
        assert example.image is not None
        draw_maps(open_image(example.image), places, target, at=((x1 + x2) / 2, (y1 + y2) / 2), side=SIDE)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(of, said)


def _asked(scale: Scale, data: Path) -> list[Example]:
    """The first question about a box of each of the first images."""
    found: dict[Path, Example] = {}
    for example in _examples(scale, data):
        if example.task == "rec" and example.image is not None and example.turns[0].answer_boxes:
            found.setdefault(example.image, example)
            if len(found) == IMAGES:
                break
    return list(found.values())


def _examples(scale: Scale, data: Path) -> Iterator[Example]:
    for source in scale.base.evaluate.sources:
        yield from examples_of(source, data)
