"""Recipe -> examples and mixtures: the readers, or the stores that they were prepared into, on a recipe's sources."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.example import Example
from ..data.image_keys import IMAGE_DATA, image_key, nameless, unplaced
from ..data.mix import parse_mix
from ..data.mixture import Mixture
from ..data.mixture import Source as Drawn
from ..data.prepare import fingerprint, open_prepared
from ..data.readers import Faults, read
from ..data.sizes import size_note
from ..data.store import Kept, image_codes
from .keys import RecipeError, nearest_key
from .recipe import Data, Source, Stage

NAME = re.compile(r"[^\W_][\w+.-]*")
"""Of a source: files are named by it."""
MANY = 1_000_000
"""Examples of a source, some 1 KB each, above which it is said that they are not prepared."""
PREPARED = ".prepared"
"""Folder of the stores, under data.root."""


def located(source: Source, root: Path) -> tuple[Path, dict[str, Path], dict[str, Any]]:
    """A source's images, files and options, paths under root. Raises RecipeError where root is no folder, and for a name that
    cannot be a file's."""
    if not NAME.fullmatch(source.name):
        raise RecipeError(f"source {source.name!r}: a name is of letters, digits, + - _ and ., a letter or digit first")
    if not root.is_dir():
        raise RecipeError(f"data.root {root} is no folder: make it (commvlm microworld write) or pass --data.root DIR")
    return root / source.images, {name: root / path for name, path in source.files.items()}, dict(source.options)


def examples_of(source: Source, root: Path, *, faults: str = "refuse") -> Sequence[Example]:
    """The raw examples of one source; paths are under root. A store made by `commvlm data prepare` is opened in place of the
    files that it was made from.

    faults: "refuse" raises for the first entry that makes no example; "skip" leaves such out and says on stderr how many.
    Raises RecipeError naming source, file and place.
    """
    images, files, options = located(source, root)
    try:
        stored = _prepared(source, root)
        if stored is not None:
            skipped = stored.meta["skipped"]
            if skipped["count"] and faults == "refuse":
                first = next(iter(skipped["places"].values()))[0]
                raise ValueError(f"{first} ({skipped['count']} such entries; data.faults skip leaves them out)")
            examples, left_out = stored, skipped["count"]
        else:
            counted = None if faults == "refuse" else Faults()
            examples = read(source.format, images=images, faults=counted, **files, **options)
            left_out = 0 if counted is None else counted.count
            if len(examples) > MANY:
                print(
                    f"source {source.name!r}: {len(examples):,} examples are held in memory by every process; "
                    "commvlm data prepare makes a store of them",
                    file=sys.stderr,
                )
    except ValueError as error:
        raise RecipeError(f"source {source.name!r}: {error}") from error
    if left_out:
        print(f"source {source.name!r}: {left_out} entries left out (commvlm data check shows them)", file=sys.stderr)
    note = size_note(source.format, files, options, len(examples))
    if note is not None:
        print(f"source {source.name!r}: {note}", file=sys.stderr)
    return examples


def store_of(source: Source, root: Path) -> Path:
    """Where a source's store is, or would be; sources of one name that say different things have different ones."""
    said = json.dumps([source.format, source.images, source.files, source.options], sort_keys=True)
    return root / PREPARED / f"{source.name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def _prepared(source: Source, root: Path) -> Any:
    images, files, options = located(source, root)
    folder = store_of(source, root)
    if not (folder / "meta.json").is_file():
        return None
    stored = open_prepared(folder, images, fingerprint(source.format, images, files, options))
    if stored is None:
        print(f"source {source.name!r}: its files changed since {folder} was made; they are read", file=sys.stderr)
    return stored


def named_examples(sources: Sequence[Source], root: Path, *, faults: str = "refuse") -> dict[str, Sequence[Example]]:
    """Every source's examples, each file read once. Raises RecipeError when two sources have one name."""
    found: dict[str, Sequence[Example]] = {}
    for source in sources:
        if source.name in found:
            raise RecipeError(f"two sources are called {source.name!r}: name them apart")
        found[source.name] = examples_of(source, root, faults=faults)
    return found


def training_examples(data: Data) -> dict[str, Sequence[Example]]:
    """The examples of data.sources, without those about an image of data.held_out; says on stderr how many those are."""
    root = Path(data.root)
    found = named_examples(data.sources, root, faults=data.faults)
    held = held_images(data)
    if not held:
        return found
    for name, examples in found.items():
        names, codes = image_codes(examples)
        tested = np.array([image_key(path) in held for path in names] + [False])  # the last one for no image, code -1
        keep = np.flatnonzero(~tested[codes])
        if unknown := unplaced(names):
            print(
                f"source {name!r}: {unknown:,} images of Visual Genome's, of which held-out ones cannot be told: put its "
                f"{IMAGE_DATA} into vg/ (commvlm data download vg-image-data)",
                file=sys.stderr,
            )
        if unnamed := nameless(names):
            print(
                f"source {name!r}: {unnamed:,} images out of rows that do not say what they are called, of which held-out "
                "ones cannot be told",
                file=sys.stderr,
            )
        if len(keep) < len(examples):
            print(
                f"source {name!r}: {len(examples) - len(keep):,} examples about held-out images left out",
                file=sys.stderr,
            )
            found[name] = Kept(examples, keep)
    return found


def held_images(data: Data) -> dict[str, str]:
    """Key of every image of data.held_out -> the source that has it."""
    root = Path(data.root)
    return {
        image_key(path): name
        for name, examples in named_examples(data.held_out, root, faults=data.faults).items()
        for path in image_codes(examples)[0]
    }


def stage_mixture(stage: Stage, data: Data, examples: Mapping[str, Sequence[Example]], *, seed: int) -> Mixture:
    """What a stage is trained on, in its order: steps x batch groups, a function of the seed alone."""
    for name in stage.weights:
        if name not in examples:
            raise RecipeError(f"stage {stage.name!r}: weights name no source {name!r}{nearest_key(name, examples)}")
    mix = None
    if stage.mix:
        if stage.weights:
            raise RecipeError(f"stage {stage.name!r}: has both mix and weights; the mix says the weights")
        if stage.mix not in data.mixes:
            raise RecipeError(
                f"stage {stage.name!r}: there is no mix {stage.mix!r}{nearest_key(stage.mix, data.mixes)}"
            )
        counts = {name: len(found) for name, found in examples.items()}
        try:
            mix = parse_mix(data.mixes[stage.mix], counts, f"data.mixes.{stage.mix}")
        except ValueError as error:
            raise RecipeError(str(error)) from error
    drawn = [Drawn(s.name, examples[s.name], stage.weights.get(s.name, s.weight)) for s in data.sources]
    length = stage.steps * stage.batch
    return Mixture(drawn, seed=seed, length=length, group=data.group, mix=mix, prompts=data.prompts)
