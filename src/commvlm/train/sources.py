"""Recipe -> examples: the readers called on a recipe's sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.example import Example
from ..data.mixture import Mixture
from ..data.mixture import Source as Drawn
from ..data.readers import read
from .keys import RecipeError, nearest_key
from .recipe import Data, Source, Stage


def examples_of(source: Source, root: Path) -> list[Example]:
    """The raw examples of one source; paths are under root. Raises ValueError naming source, file and place."""
    if not root.is_dir():
        raise RecipeError(f"data.root {root} is no folder: make it (commvlm microworld write) or pass --data.root DIR")
    files = {name: root / path for name, path in source.files.items()}
    try:
        return read(source.format, images=root / source.images, **files, **source.options)
    except ValueError as error:
        raise RecipeError(f"source {source.name!r}: {error}") from error


def named_examples(sources: Sequence[Source], root: Path) -> dict[str, list[Example]]:
    """Every source's examples, each file read once. Raises RecipeError when two sources have one name."""
    found: dict[str, list[Example]] = {}
    for source in sources:
        if source.name in found:
            raise RecipeError(f"two sources are called {source.name!r}: name them apart")
        found[source.name] = examples_of(source, root)
    return found


def stage_mixture(stage: Stage, data: Data, examples: Mapping[str, list[Example]], *, seed: int) -> Mixture:
    """What a stage is trained on, in its order: steps x batch groups, a function of the seed alone."""
    for name in stage.weights:
        if name not in examples:
            raise RecipeError(f"stage {stage.name!r}: weights name no source {name!r}{nearest_key(name, examples)}")
    drawn = [Drawn(s.name, examples[s.name], stage.weights.get(s.name, s.weight)) for s in data.sources]
    return Mixture(drawn, seed=seed, length=stage.steps * stage.batch, group=data.group)
