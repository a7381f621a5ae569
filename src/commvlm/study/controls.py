"""What the paper's reviewers found missing, as rows: isolated fusion, matched capacity, random and blind controls, peers."""

from __future__ import annotations

from dataclasses import replace

from ..model.config import CommVisionConfig
from ..model.spec import build_config
from ..train.assemble import model_settings
from ..train.keys import nearest_key
from ..train.recipe import Encoder, Model, load_recipe, shipped_recipes
from .rows import Row, comm, depth_of, encoder, is_dino, mfm, pair, single, single_name
from .settings import Scale, StudyEncoder

NO_MERGE = "pair, no merging"
RANDOM_TWIN = "COMM, random second encoder"
TWICE = "first encoder twice"
LARGER = "first encoder, larger image"
CAPACITY = "one encoder of the pair's size"
SHUFFLED = "COMM, shuffled images"
BLIND = "COMM, blind"


def controls(scale: Scale) -> list[Row]:
    """COMM, and it with one thing taken away or matched."""
    first, second = pair(scale)
    lasts = [single(scale, given, given.last) for given in (first, second)]
    rows = [comm(scale), mfm(scale, first), mfm(scale, second), *lasts]
    rows.append(Row(NO_MERGE, scale.model(encoder(first, first.last), encoder(second, second.last))))
    rows += [with_mlp(scale, first), without_mlp(scale, second)]
    rows.append(comm(scale, RANDOM_TWIN, weights="random"))
    rows.append(twice(scale, first))
    if scale.larger_image is not None:
        rows.append(larger(scale, first, scale.larger_image))
    if scale.capacity is not None:
        rows.append(Row(CAPACITY, mfm(scale, scale.capacity).model))
    rows += [comm(scale, SHUFFLED, pixels="shuffled"), comm(scale, BLIND, pixels="grey")]
    if scale.controls is None:
        return rows
    known = {row.name: row for row in rows}
    for name in scale.controls:
        if name not in known:
            raise ValueError(f"scale {scale.name}: there is no control {name!r}{nearest_key(name, known)}")
    return [known[name] for name in scale.controls]


def with_mlp(scale: Scale, given: StudyEncoder) -> Row:
    """An encoder's last layer behind the MLP: whether the MLP, and not the vision-only encoder, makes the difference."""
    return Row(f"{single_name(given, given.last)} + MLP", scale.model(encoder(given, given.last, align=scale.mlp)))


def without_mlp(scale: Scale, given: StudyEncoder) -> Row:
    """An encoder's last layer aligned by nothing but the projection."""
    return Row(f"{single_name(given, given.last)}, linear", scale.model(encoder(given, given.last, align="identity")))


def twice(scale: Scale, given: StudyEncoder) -> Row:
    """COMM's shape and trained parameters with one encoder in both places: the second branch brings no second view."""
    _, second = pair(scale)
    again = encoder(given, second.merged, "lln-layerscale", align=second.align, name=f"{given.name}_again")
    return Row(TWICE, scale.model(encoder(given, given.merged, "lln-layerscale"), again))


def larger(scale: Scale, given: StudyEncoder, side: int) -> Row:
    """One encoder at an image so large that it costs about what the pair costs; its tokens resampled to the pair's grid."""
    usual = mfm(scale, given).model
    vision = _visual_half(usual)
    if vision is None:
        return Row(LARGER, usual)
    rows, columns = vision.grid_of(given.name)
    branch = encoder(given, given.merged, "lln-layerscale", image_size=side)
    return Row(LARGER, scale.model(branch, fuse={"kind": "channel-concat", "grid": [rows, columns]}))


def _visual_half(model: Model) -> CommVisionConfig | None:
    """None of a model that cannot be built. A row that would follow from it has that model itself, so that what is wrong is
    told of it where rows are built, with all others that cannot be."""
    try:
        return build_config(**model_settings(model)).vision_config  # type: ignore[return-value]
    except ValueError:
        return None


def collapse(scale: Scale) -> list[Row]:
    """Table 6's rows; each run measures what gradients and activations do in its alignment."""
    from .experiments import table_6

    return table_6(scale)


def peers(scale: Scale) -> list[Row]:
    """The visual half of every recipe in recipes/peers, with this scale's encoders, data and steps; COMM beside them."""
    names = [name for name in shipped_recipes() if name.startswith("peers/")]
    return [comm(scale), *(peer(scale, name) for name in names)]


def peer(scale: Scale, name: str) -> Row:
    """A peer's merges, fuse and projection; its encoders as they are where the scale has them, else the pair's nearest."""
    theirs = load_recipe(name).model
    known = {given.checkpoint for given in scale.encoders}
    if all(branch.checkpoint in known for branch in theirs.encoders):
        model = replace(theirs, language_model=scale.base.model.language_model)
    else:
        model = translated(scale, theirs)
    return Row(f"peer {name.removeprefix('peers/').removesuffix('-7b')}", model)


def translated(scale: Scale, theirs: Model) -> Model:
    """A peer's visual half on the scale's encoders: DINOs become the pair's second encoder, all others its first. Layers keep
    their distance from the end where that is at most two, and their relative depth elsewhere."""
    first, second = pair(scale)
    there = _visual_half(theirs)
    if there is None:
        return theirs
    branches = []
    for asked, settled in zip(theirs.encoders, there.branches or [], strict=True):
        given = second if is_dino(there.encoder_config(settled["name"])) else first
        depth = depth_of(given)
        layers = settled["layers"] if depth is None else scaled(settled["layers"], settled["depth"], depth)
        branches.append(
            Encoder(
                name=given.name, checkpoint=given.checkpoint, image_size=given.image_size, layers=list(layers),
                merge=asked.merge, align=asked.align, final_norm=asked.final_norm,
            )
        )  # fmt: skip
    return replace(theirs, encoders=branches, language_model=scale.base.model.language_model)


def scaled(layers: list[int] | tuple[int, ...], depth: int, onto: int) -> tuple[int, ...]:
    """Layers of an encoder of `depth` blocks as those of one of `onto` blocks; several may fall together."""
    return tuple(sorted({_scaled(layer, depth, onto) for layer in layers}))


def _scaled(layer: int, depth: int, onto: int) -> int:
    left = depth - layer
    return onto - left if left <= 2 else max(1, round(layer / depth * onto))
