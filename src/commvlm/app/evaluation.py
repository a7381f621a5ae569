"""A checkpoint's answers to a recipe's questions: predictions first, then scores and receipts from the files alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..evaluate.official import write_official
from ..evaluate.predictions import read_predictions
from ..evaluate.receipts import fingerprint, read_receipt, receipt, write_json
from ..evaluate.run import predict, score
from ..evaluate.scores import read_scores, write_scores
from ..evaluate.shards import Shard
from ..evaluate.tasks import Score
from ..evaluate.tasks.rec import BOX_CODEC, GEOMETRY
from ..train.recipe import Evaluate, Recipe, Source, as_yaml, load_recipe
from .answering import Answerer
from .checkpoint import is_ours, resolve_checkpoint
from .library_answering import LibraryAnswerer, load_library_model
from .questions import Questions, questions_of


@dataclass(frozen=True)
class Place:
    """What is evaluated, by which recipe, and where the answers go. images: what it is shown, "given" or a control's."""

    checkpoint: Path
    recipe: Recipe
    out: Path
    images: str


def evaluate(
    checkpoint: Path, *, tasks: Sequence[str] = (), overrides: Sequence[str] = (), recipe: str | None = None,
    out: Path | None = None, shard: Shard | None = None,
) -> dict[str, Score]:  # fmt: skip
    """Writes OUT/predictions/{name}.jsonl, then OUT/scores.json, OUT/receipts/{name}.json and the answers in the official
    formats (OUT/official), and returns the scores; names are those of `questions.Questions`.

    checkpoint: a run of `commvlm train`, a saved COMM model, or any image-text-to-text model of the library. recipe: whose
    questions are asked; a run's own by default. out: a run's folder, or the checkpoint's, by default. tasks: which of those
    that the recipe asks, or sets of questions; all by default. overrides: recipe options, such as another data.root.
    shard: this process among several (torchrun's by default); the first one scores, the others return nothing.
    Scores of other tasks stay in the file; sets whose sources have no answers (test-dev) have none. Raises ValueError for a
    folder that is no finished run or model, and for a task that the recipe does not ask.
    """
    place = _place(checkpoint, recipe=recipe, overrides=overrides, out=out)
    asked = sorted(questions_of(place.recipe, tasks), key=lambda one: one.name)
    shard = _shard_of_torchrun() if shard is None else shard
    answer, made = _answerer(place, shard)
    seconds: dict[str, float] = {}
    for one in asked:
        start = time.perf_counter()
        predict(
            answer, one.examples, _predictions(place, one.name), batch_size=8 * place.recipe.evaluate.batch,
            progress=one.name, shard=shard, notes=_notes(place, answer), made=_maker(made, place),
        )  # fmt: skip
        seconds[one.name] = time.perf_counter() - start
    if shard.rank:
        return {}
    rules = place.recipe.evaluate.rules
    scores: dict[str, Score] = {}
    table = place.out / "scores.json"
    kept = read_scores(table) if tasks and table.exists() else {}
    for one in asked:
        path = _predictions(place, one.name)
        records = read_predictions(path)
        official = write_official(records, place.out / "official", name=one.name)
        if not any(record.references or record.answer or record.boxes for record in records):
            files = " ".join(map(str, official)) or path
            print(f"{one.name}: not scored, its sources have no answers; to be sent in: {files}", file=sys.stderr)
            continue
        scores[one.name] = score(path, rules={one.task: rules[one.task]} if one.task in rules else {})[one.task]
        _write_receipt(place, scores[one.name], path, asked=one, made=made, seconds=seconds[one.name])
        write_scores({**kept, **scores}, table)  # at once: a later set may have a fault
    if not scores:
        write_scores(kept, table)
    return scores


def _place(checkpoint: Path, *, recipe: str | None, overrides: Sequence[str], out: Path | None) -> Place:
    own = checkpoint / "recipe.yaml"
    if own.is_file() and not (checkpoint / "run.json").is_file():
        raise ValueError(f"{checkpoint} is no finished run: it has no run.json; train it first (commvlm train)")
    if recipe is None and not own.is_file():
        _model_folder(checkpoint)
        raise ValueError(
            f"{checkpoint} has no recipe.yaml that says what is asked: add --recipe, such as --recipe micro"
        )
    given = load_recipe(own if recipe is None else recipe, overrides)
    folder = _model_folder(checkpoint)
    trained = _images(folder.parent) if (folder.parent / "run.json").is_file() else "given"
    # A run's own recipe says what it was trained to see; another one says it only where it names a control.
    images = given.data.pixels if recipe is None or given.data.pixels != "given" else trained
    off = given.evaluate.knock_out
    for name, asked in (("evaluate.knock_out", off), ("data.pixels", "" if images == "given" else images)):
        if asked and not is_ours(folder):
            raise ValueError(f"{folder} is a model of the library's: {name} {asked!r} is for COMM models alone")
    if out is None:  # answers without a part, or to other images, are no answers of the whole
        parts = [f"without-{re.sub(r'[^a-z0-9_-]+', '_', off.lower())}"] if off else []
        parts += [f"images-{images}"] if images != trained else []
        out = checkpoint / "-".join(parts) if parts else checkpoint
    return Place(folder, given, out, images)


def _model_folder(checkpoint: Path) -> Path:
    """A COMM model's folder, or the folder of another model of the library. Raises ValueError for neither."""
    config = checkpoint / "config.json"
    return checkpoint if config.is_file() and not is_ours(checkpoint) else resolve_checkpoint(checkpoint)


def _model_files(folder: Path) -> list[Path]:
    """Weights, configs, tokenizer and code of a model's folder; scores of it may lie beside them."""
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
    return [path for path in folder.iterdir() if path.suffix in kinds and path.name != "scores.json"]


def _answerer(place: Place, shard: Shard) -> tuple[Answerer | LibraryAnswerer, dict[str, object]]:
    """The model as an answerer, and what a receipt says of it."""
    asked, ours = place.recipe.evaluate, is_ours(place.checkpoint)
    one_of_several = shard.ranks > 1 and "LOCAL_RANK" in os.environ and torch.cuda.is_available()
    given: dict[str, Any] = {
        "max_new_tokens": asked.max_new_tokens, "batch_size": asked.batch, "precision": asked.precision,
        "device": f"cuda:{os.environ['LOCAL_RANK']}" if one_of_several else None,
    }  # fmt: skip
    if ours:
        answer = Answerer(place.checkpoint, images=place.images, knock_out=asked.knock_out, **given)
    else:
        answer = LibraryAnswerer(
            *load_library_model(place.checkpoint), codec=asked.codec, geometry=asked.geometry, **given
        )
    made = {
        "model": fingerprint(place.checkpoint, _model_files(place.checkpoint)),
        "recipe": {"name": place.recipe.name, "sha256": hashlib.sha256(_portable(place.recipe).encode()).hexdigest()},
        "images": place.images,
        **({"knock_out": asked.knock_out} if asked.knock_out else {}),
        "decoding": {
            "greedy": True, "max_new_tokens": asked.max_new_tokens, "batch": asked.batch, "precision": asked.precision,
        },
        "device": answer.device.type,
        "weights": str(answer.model.dtype).removeprefix("torch."),
    }  # fmt: skip
    return answer, made


def _notes(place: Place, answer: Answerer | LibraryAnswerer) -> dict[str, str | int | float]:
    """What every record notes of how boxes are written, where it is not as here."""
    usual, asked = Evaluate(), place.recipe.evaluate
    if isinstance(answer, Answerer):
        asked = replace(usual, geometry=answer.processor.image_processor.geometry)
    if (asked.codec, asked.geometry) == (usual.codec, usual.geometry):
        return {}
    return {BOX_CODEC: asked.codec, GEOMETRY: asked.geometry}


def _maker(made: Mapping[str, Any], place: Place) -> dict[str, object]:
    """What answers depend on, flat; how many are asked at once, and where, is no part of it."""
    asked = place.recipe.evaluate
    return {
        "model": made["model"]["sha256"], "images": place.images, "knock_out": asked.knock_out,
        "max_new_tokens": asked.max_new_tokens, "precision": asked.precision,
        **({} if is_ours(place.checkpoint) else {"codec": asked.codec, "geometry": asked.geometry}),
    }  # fmt: skip


def _portable(recipe: Recipe) -> str:
    """The recipe without where its data lie on this machine."""
    return as_yaml(replace(recipe, data=replace(recipe.data, root="")))


def _predictions(place: Place, name: str) -> Path:
    return place.out / "predictions" / f"{name}.jsonl"


def _write_receipt(
    place: Place, found: Score, path: Path, *, asked: Questions, made: Mapping[str, object], seconds: float
) -> None:
    """Beside the score. Answers that were there before keep what their receipt says of how they were made."""
    target = place.out / "receipts" / f"{asked.name}.json"
    fresh = receipt(
        found, read_predictions(path), split=", ".join(source.name for source in asked.sources),
        files=_files(asked.sources, Path(place.recipe.data.root)), predictions=path, made=made, seconds=seconds,
    )  # fmt: skip
    if target.exists():
        earlier = read_receipt(target)
        if (earlier.get("predictions") or {}).get("sha256") == fresh["predictions"]["sha256"]:
            fresh |= {name: earlier.get(name) for name in ("made", "seconds")}
        if earlier == fresh:
            return
    write_json(fresh, target)


def _files(sources: Sequence[Source], root: Path) -> dict[str, Path]:
    """Each source's annotation files; the images' folder where they lie in it."""
    found: dict[str, Path] = {}
    for source in sources:
        named = {name: root / path for name, path in source.files.items()} or {"images": root / source.images}
        found |= {f"{source.name}.{name}": path for name, path in named.items()}
    return found


def _images(run: Path) -> str:
    """What the run was trained to see: "given" images, or a control's."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'run.json'} is none that commvlm train wrote; train the run again") from error


def _shard_of_torchrun() -> Shard:
    """This process among those that torchrun started; alone without it."""
    return Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
