"""A scale of the study: which encoders, layers, seeds and data, on top of which recipe. One YAML file each, in scales/."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from ..evaluate.tasks import TASKS
from ..model.config import check_encoder_name
from ..model.feature_store import KEPT
from ..train.filling import filled
from ..train.keys import RecipeError, check_keys, nearest_key
from ..train.recipe import Encoder, Model, Recipe, load_recipe, read_yaml

FOLDER = "scales"


@dataclass(frozen=True)
class StudyEncoder:
    """An encoder as every figure has it: one line of the scale's file.

    name, checkpoint, image_size: as in a recipe. align: how its features are aligned (the paper: an MLP where the encoder
    never saw text). merged: the layers that its merged branch takes ("+ MFM", COMM). last: the layer that stands for "one
    deep layer". deep: the layers that Mean(half) takes. merges: whether Figure 3 has it; the pair always is there.
    """

    name: str
    checkpoint: str
    align: str | dict[str, Any] = "identity"
    image_size: int | None = None
    merged: int | str | list[int | str] = "all"
    last: int = -1
    deep: int | str | list[int | str] = "half"
    weights: str = "checkpoint"
    merges: bool = True

    @property
    def one_layer(self) -> str:
        """What `last` is called: "last layer", or "layer -2"."""
        return "last layer" if self.last == -1 else f"layer {self.last}"


@dataclass(frozen=True)
class World:
    """Scenes of the micro world that a scale trains on and asks about."""

    train: int
    test: int
    difficulty: str = "easy"


@dataclass(frozen=True)
class Scale:
    """name: of its folder. recipe: whose data, language model, training and questions every run has. options: keys of that
    recipe that are changed, by their dotted names. pair: the names of the two encoders that COMM joins, the text-supervised
    one first. layers: 1-based block outputs of the layer sweeps. seeds: runs of every row; more_seeds: of the rows that a
    pattern of names fits, such as "COMM*", where a claim needs more. mlp: the alignment that stands for "an MLP".
    depths, ratios: of the alignment sweep. others: layers at which Table 7 reads the encoders beside the pair; the two
    deepest of the sweep by default. tasks: those that are scored: a task (the mean over its sets, where the recipe asks
    several), or one set of it, "caption.flickr30k". larger_image: side in pixels at which the first
    encoder costs about as much as the pair. capacity: a single encoder of about the pair's size, if there is one.
    controls: those of the controls that this scale runs, by name; all of them without it.
    world: the micro world to make; without it the data are at data.root. features: how the encoders' features are kept,
    "fp32", "bf16" or "int8", so that they run once for all runs; without it they run in every step. keep: whether trained
    models stay on the disk. processes: of each run, one GPU each where there are any; as everywhere, they share its batch.
    """

    name: str
    recipe: str
    encoders: list[StudyEncoder]
    pair: list[str]
    layers: list[int]
    seeds: int = 3
    more_seeds: dict[str, int] = field(default_factory=dict)
    mlp: dict[str, Any] = field(default_factory=lambda: {"kind": "mlp", "hidden": 1, "ratio": 4})
    depths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    ratios: list[int] = field(default_factory=lambda: [8, 16])
    others: list[int] | None = None
    tasks: list[str] = field(default_factory=lambda: ["rec", "reg", "pope", "vqa", "caption"])
    larger_image: int | None = None
    capacity: StudyEncoder | None = None
    controls: list[str] | None = None
    world: World | None = None
    options: dict[str, Any] = field(default_factory=dict)
    features: str | None = None
    keep: bool = False
    processes: int = 1

    @property
    def deepest(self) -> list[int]:
        """The layers of Table 7, ascending."""
        return sorted(self.layers)[-2:] if self.others is None else sorted(self.others)

    def seeds_of(self, row: str) -> int:
        """How many runs a row of this name has."""
        return max([self.seeds, *(count for pattern, count in self.more_seeds.items() if fits(row, pattern))])

    def encoder(self, name: str) -> StudyEncoder:
        return next(e for e in self.encoders if e.name == name)

    @cached_property
    def base(self) -> Recipe:
        """The recipe under every run, options applied. Raises RecipeError for one that starts from a whole model."""
        words = [word for key, value in self.options.items() for word in (f"--{key}", _word(value))]
        recipe = load_recipe(self.recipe, words)
        if recipe.train.start:
            raise RecipeError(
                f"scale {self.name}: train.start gives one model's weights, every row is another: leave it out"
            )
        return recipe

    def model(self, *encoders: Encoder, **changes: Any) -> Model:
        """The base recipe's model with these encoders in place of its own."""
        return replace(self.base.model, encoders=list(encoders), **changes)


def fits(row: str, pattern: str) -> bool:
    """Whether a row's name fits: as a pattern, or as it stands, since a row of listed layers has brackets in its name."""
    return row == pattern or fnmatch.fnmatchcase(row, pattern)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def shipped_scales() -> dict[str, Path]:
    """The scales that come with the package, by name."""
    folder = Path(str(resources.files("commvlm.study") / FOLDER))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_scale(name: str) -> Scale:
    """A shipped scale by name, or a YAML file's. Raises RecipeError for neither, an unknown key (with the nearest one), a
    wrong type, or settings that do not fit each other."""
    shipped = shipped_scales()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        near = get_close_matches(name, shipped, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"there is no scale {name!r}; {hint}shipped: {', '.join(shipped)}; or give a YAML file")
    content = read_yaml(path)
    check_keys(content, Scale, where=path.name)
    scale = filled(content, Scale, where=path.name)
    _check(scale, path.name)
    beside = path.parent / scale.recipe  # as `extends` has it
    return replace(scale, recipe=str(beside)) if beside.is_file() else scale


def _check(scale: Scale, where: str) -> None:
    for encoder in (*scale.encoders, *([scale.capacity] if scale.capacity else [])):
        try:
            check_encoder_name(encoder.name)
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error
    names = [encoder.name for encoder in scale.encoders]
    if len(set(names)) != len(names):
        raise RecipeError(f"{where}: two encoders have one name: {', '.join(names)}")
    if len(scale.pair) != 2 or scale.pair[0] == scale.pair[1]:
        raise RecipeError(f"{where}: pair names two encoders, it is {scale.pair}")
    for name in scale.pair:
        if name not in names:
            raise RecipeError(f"{where}: pair names {name!r}, which is none of its encoders {', '.join(names)}")
    for name in ("seeds", "processes"):
        if getattr(scale, name) < 1:
            raise RecipeError(f"{where}: {name} is {getattr(scale, name)}, it must be at least 1")
    for pattern, count in scale.more_seeds.items():
        if count <= scale.seeds:
            raise RecipeError(
                f"{where}: more_seeds.{pattern} is {count}, every row has {scale.seeds} seeds: give it more, or leave it out"
            )
    for name, meant in (
        ("layers", "block outputs of the layer sweeps"), ("depths", "hidden layers of the alignments"),
        ("others", "block outputs of Table 7"),
    ):  # fmt: skip
        if getattr(scale, name) == []:
            raise RecipeError(f"{where}: {name} is empty: name the {meant}")
    for name in ("layers", "others"):
        odd = [layer for layer in getattr(scale, name) or [] if layer < 1]
        if odd:
            raise RecipeError(f"{where}: {name} has {odd[0]}: block outputs are counted from 1, from the shallow end")
    if scale.world is not None and min(scale.world.train, scale.world.test) < 1:
        raise RecipeError(f"{where}: world needs a training and a test scene at least")
    if scale.features not in (None, *KEPT):
        raise RecipeError(f"{where}: features is {scale.features!r}, it must be {' or '.join(KEPT)}")
    if not scale.tasks:
        raise RecipeError(f"{where}: tasks is empty: name what is scored")
    for task in scale.tasks:
        if task.split(".")[0] not in TASKS:
            raise RecipeError(f"{where}: tasks names no task {task!r}{nearest_key(task, TASKS)}")
        if task.split(".")[0] == "mme":
            raise RecipeError(
                f"{where}: tasks names mme, whose total is no mean over questions: rows cannot be paired on it"
            )
