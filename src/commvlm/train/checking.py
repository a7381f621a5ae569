"""A recipe's sources, checked and prepared: what `commvlm data` does before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..data.boxes import View
from ..data.check import SourceCheck, check_examples, chosen_images, look_at_images
from ..data.dialogue import encode_all
from ..data.example import Example
from ..data.image_keys import image_key
from ..data.prepare import fingerprint, open_prepared, prepare_source
from ..data.readers import Faults, read
from ..data.sizes import size_note
from ..data.store import Stored, image_codes
from ..data.templates import instruct
from ..model.build import add_image_token
from ..model.checkpoints import CheckpointError
from ..model.spec import build_config
from .assemble import load_tokenizer, model_settings
from .keys import RecipeError
from .recipe import Recipe, Source
from .sources import located, store_of


@dataclass(frozen=True)
class Checked:
    """A source's check, and its examples for drawing (none where it could not be read)."""

    check: SourceCheck
    examples: Sequence[Example]


def sources_of(recipe: Recipe) -> list[tuple[str, Source]]:
    """Every source with its role: "train", "evaluate" or "held out"."""
    return [
        (role, source)
        for role, sources in (
            ("train", recipe.data.sources), ("evaluate", recipe.evaluate.sources), ("held out", recipe.data.held_out),
        )
        for source in sources
    ]  # fmt: skip


def check_recipe(recipe: Recipe, *, images: int | None = None, workers: int | None = None) -> list[Checked]:
    """Every source read, its images decoded, its boxes and texts looked at. images: how many of a source are opened, all by
    default. A source that cannot be read says why in its check; only data.root must be there. A bar shows the progress."""
    root = Path(recipe.data.root)
    found: list[Checked] = []
    with Progress(transient=True) as bars:
        bar = bars.add_task("reading", total=len(sources_of(recipe)))
        for role, source in sources_of(recipe):
            found.append(_read(role, source, root))
            bars.advance(bar)
        shown = [image_codes(item.examples)[0] for item in found]
        wanted = list(dict.fromkeys(path for paths in shown for path in chosen_images(paths, images)))
        bar = bars.add_task("decoding images", total=len(wanted))
        seen = look_at_images(wanted, workers=workers, advance=lambda: bars.advance(bar))
        asked, held = (
            {
                image_key(path): item.check.name
                for item, paths in zip(found, shown, strict=True)
                if item.check.role == role
                for path in paths
            }
            for role in ("evaluate", "held out")
        )
        lengths = _lengths(recipe)
        bar = bars.add_task("checking", total=sum(len(item.examples) for item in found))
        for item in found:
            training = item.check.role == "train"
            check_examples(
                item.check, _counted(item.examples, lambda: bars.advance(bar)), seen, asked=asked if training else None,
                held=held if training else {}, lengths=lengths if training else None, longest=recipe.train.max_length,
            )  # fmt: skip
    return found


def _counted(examples: Sequence[Example], advance: Callable[[], None]) -> Iterator[Example]:
    for example in examples:
        advance()
        yield example


def _read(role: str, source: Source, root: Path) -> Checked:
    images, files, options = located(source, root)
    sizes = {name: (str(path), path.stat().st_size if path.exists() else None) for name, path in files.items()}
    check = SourceCheck(source.name, role, source.format, sizes)
    try:
        examples, left_out = _examples(source, root, images, files, options)
    except ValueError as error:
        check.error = str(error)
        return Checked(check, [])
    for places in left_out["places"].values():
        for place in places:
            check.problems["left out"].add(place, 0)
    check.problems["left out"].count = left_out["count"]
    check.note = size_note(source.format, files, options, len(examples))
    return Checked(check, examples)


def _examples(
    source: Source, root: Path, images: Path, files: dict[str, Path], options: dict[str, Any]
) -> tuple[Sequence[Example], dict[str, Any]]:
    stored = open_prepared(store_of(source, root), images, fingerprint(source.format, images, files, options))
    if stored is not None:
        return stored, stored.meta["skipped"]
    faults = Faults()
    examples = read(source.format, images=images, faults=faults, **files, **options)
    return examples, {"count": faults.count, "places": faults.places}


def _lengths(recipe: Recipe) -> Callable[[Sequence[Example]], list[int]] | None:
    """Tokens of examples under the recipe's own tokenizer; None where that is not at hand."""
    if recipe.train.max_length is None:
        return None
    try:
        tokenizer: Any = load_tokenizer(recipe.model.language_model)
        config = build_config(**model_settings(recipe.model))
    except (CheckpointError, ValueError, OSError):
        return None
    add_image_token(tokenizer)
    view = View.whole(1000, 1000)  # a box takes as many characters wherever it lies

    def encoded(examples: Sequence[Example]) -> list[int]:
        asked = [instruct(example, prompts=recipe.data.prompts) for example in examples]
        rows = encode_all(asked, tokenizer, image_tokens=config.num_image_tokens, geometries=[view] * len(asked))
        return [len(row.ids) for row in rows]

    def lengths(examples: Sequence[Example]) -> list[int]:
        try:
            return encoded(examples)
        except ValueError:
            if len(examples) == 1:
                return [0]  # what cannot be encoded at all is told by another problem
            return [length for example in examples for length in lengths([example])]

    return lengths


def prepare_recipe(recipe: Recipe, sources: Iterable[str] = ()) -> list[tuple[Source, Stored]]:
    """Every source as a store under data.root; those that are there and fit are left as they are. sources: names, all by
    default. A bar shows which one is read. Raises RecipeError naming the source."""
    root, names = Path(recipe.data.root), set(sources)
    unknown = names - {source.name for _, source in sources_of(recipe)}
    if unknown:
        known = ", ".join(dict.fromkeys(source.name for _, source in sources_of(recipe)))
        raise RecipeError(f"the recipe has no source {sorted(unknown)[0]!r}; it has {known}")
    wanted = [source for _, source in sources_of(recipe) if not names or source.name in names]
    made: list[tuple[Source, Stored]] = []
    with Progress(transient=True) as bars:
        bar = bars.add_task("preparing", total=len(wanted))
        for source in wanted:
            bars.update(bar, description=f"preparing {source.name}")
            images, files, options = located(source, root)
            try:
                made.append((source, prepare_source(store_of(source, root), source.format, images, files, options)))
            except ValueError as error:
                raise RecipeError(f"source {source.name!r}: {error}") from error
            bars.advance(bar)
    return made
