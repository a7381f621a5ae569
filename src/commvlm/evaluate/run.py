"""Predict, then score: answers go to a file first, and every score comes from that file alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from commvlm.data.example import Box, Example
from commvlm.data.images import FORMATS

from .predictions import append_records, drop_torn_line, read_predictions, read_unfinished
from .shards import ALONE, Shard, gather, move_aside, shard_path, shard_paths
from .tasks import Record, Score, task_named
from .tasks.task import NO_FACTS, Facts, Size

Answerer = Callable[[Sequence[Example]], list[str]]
"""Instructed examples -> the answer to each one's last turn, in order. A model, an oracle and a mute one all are."""

_Key = tuple[str, str]
MADE = ".made.json"
"""In the place of ".jsonl": what the answers of that file are made by."""


def predict(
    answer: Answerer,
    examples: Sequence[Example],
    path: Path | str,
    *,
    batch_size: int = 16,
    progress: str | None = "predict",
    shard: Shard = ALONE,
    notes: Facts = NO_FACTS,
    made: Mapping[str, object] | None = None,
) -> Path:
    """Asks every raw example once and writes the answers to `path` (predictions.jsonl); returns it.

    Questions about one image are asked side by side, images in the order in which they first come. After a kill the same
    call goes on where its files end, with any number of ranks. Of several ranks each asks its own images and returns when
    the whole file is there, put together by the last one. Answers that were there before are held against today's truth:
    it is taken from the examples, not from the file. progress: the label of the bar, None for no bar.
    notes: facts that every record gets, such as how boxes are written. made: by what the answers are made, kept beside them
    (`MADE`): answers of something else are neither taken nor added to.
    Raises ValueError for no examples, two examples of one task and id, an image that cannot be read, an answerer that
    returns something else than one text per example, a file whose predictions belong to other examples or were made by
    something else, or a rank that has stopped; OSError when the disk is full (what was written until then stays).
    """
    path = Path(path)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    asked = _instructed(examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _already_there(path, asked)
    if made is not None:
        _made_alike(path, made, begun=bool(done), shard=shard)
    mine = _of_rank(asked, shard)
    todo = [example for key, example in mine.items() if key not in done]
    if path.exists() and not any(key not in done for key in asked):
        return path if shard.rank else _by_todays_truth(path, asked, notes)
    unfinished = shard_path(path, shard)
    if path.exists():
        move_aside(path)
    if unfinished.exists():
        drop_torn_line(unfinished)
    with (
        unfinished.open("ab") as file,
        tqdm(
            total=len(mine), initial=len(mine) - len(todo), desc=progress, unit="answer", disable=progress is None
        ) as bar,
    ):
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            append_records(file, _answered(answer, batch, notes))
            bar.update(len(batch))
    gather(path, list(asked), shard)
    return path if shard.rank else _by_todays_truth(path, asked, notes)


def score(path: Path | str, *, rules: Mapping[str, str] | None = None) -> dict[str, Score]:
    """The score of every task in a file of predictions, by the tasks' order of name; the same file, the same bytes.

    rules: a rule other than the default one for a task, e.g. {"caption": "ptb", "vqa": "pre2021"}.
    Raises ValueError for a broken line (its number), a file without predictions, and a task or rule that is unknown.
    """
    rules = {} if rules is None else rules
    for name in rules:
        task_named(name)
    # Sorted: sums of floats must not depend on the order in which answers came in.
    records = sorted(read_predictions(path), key=lambda record: (record.task, record.id))
    if not records:
        raise ValueError(f"{path} holds no predictions: predict first")
    names = sorted({record.task for record in records})
    return {
        name: task_named(name).score([record for record in records if record.task == name], rule=rules.get(name))
        for name in names
    }


def _instructed(examples: Sequence[Example]) -> dict[_Key, Example]:
    """Each example in its task's wording, by task and id."""
    asked: dict[_Key, Example] = {}
    for example in examples:
        key = (example.task, example.id)
        if key in asked:
            raise ValueError(f"two examples of task {example.task} have the id {example.id}: ids must be unique")
        asked[key] = task_named(example.task).instruct(example)
    if not asked:
        raise ValueError("there is nothing to predict: no examples were given")
    images: dict[Path | None, list[_Key]] = {}
    for key, example in asked.items():
        images.setdefault(example.image, []).append(key)
    return {key: asked[key] for keys in images.values() for key in keys}


def _of_rank(asked: Mapping[_Key, Example], shard: Shard) -> dict[_Key, Example]:
    """What a rank asks: every `ranks`-th image, all its questions with it, so that an image is read by one rank only."""
    place = {image: k for k, image in enumerate(dict.fromkeys(example.image for example in asked.values()))}
    return {key: example for key, example in asked.items() if place[example.image] % shard.ranks == shard.rank}


def _already_there(path: Path, asked: Mapping[_Key, Example]) -> set[_Key]:
    """Which examples have their line, in whichever file; what a kill left of a last line does not count."""
    unfinished = shard_paths(path)
    if unfinished and path.exists() and asked.keys() <= {(r.task, r.id) for r, _ in read_unfinished(path)}:
        for left in unfinished:  # a kill just after they were put together
            left.unlink(missing_ok=True)
        unfinished = []
    if unfinished and path.exists():
        raise ValueError(f"both {path} and {unfinished[0].name} exist: delete the one that is out of date")
    done: set[_Key] = set()
    for current in unfinished or [path]:
        for record, _ in read_unfinished(current) if current.exists() else []:
            example = asked.get((record.task, record.id))
            if example is None:
                raise ValueError(
                    f"{current} holds {record.name}, which is not asked here: give another file, or delete it"
                )
            if example.turns[-1].question != record.question or _asked_boxes(example) != record.asked_boxes:
                raise ValueError(f"{current} asked {record.name} in other words: give another file, or delete it")
            done.add((record.task, record.id))
    return done


def _made_alike(path: Path, made: Mapping[str, object], *, begun: bool, shard: Shard) -> None:
    """Notes what the answers are made by; of answers that have begun, raises ValueError where they were made otherwise."""
    note = path.with_suffix(MADE)
    if not begun:
        part = note.with_name(f"{note.name}.tmp-{shard.rank}")  # every rank writes the same
        part.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        os.replace(part, note)
    elif note.is_file():  # answers of before there were notes have none
        was = json.loads(note.read_text(encoding="utf-8"))
        odd = next((name for name in {**was, **made} if was.get(name) != made.get(name)), None)
        if odd is not None:
            raise ValueError(
                f"{path} holds answers of another {odd} ({was.get(odd)}, not {made.get(odd)}): "
                "choose another folder, or delete it"
            )


def _by_todays_truth(path: Path, asked: Mapping[_Key, Example], notes: Facts) -> Path:
    """Annotations may have been corrected since the answers were given: the file is written anew where they were."""
    records = read_predictions(path)
    fresh = [_with_truth(record, asked[record.task, record.id], notes) for record in records]
    if fresh != records:
        part = path.with_name(path.name + ".tmp")
        with part.open("wb") as file:
            append_records(file, fresh)
        os.replace(part, path)
    return path


def _with_truth(record: Record, example: Example, notes: Facts) -> Record:
    facts = {**example.facts, **notes}
    size = None if record.width is None or record.height is None else (record.width, record.height)
    return replace(
        record, answer=example.turns[-1].answer, boxes=_true_boxes(example), references=example.references, facts=facts,
        parsed=task_named(record.task).parse(record.text, size, facts),
    )  # fmt: skip


def _true_boxes(example: Example) -> tuple[Box, ...]:
    return tuple(box for group in example.turns[-1].answer_boxes for box in group)


def _asked_boxes(example: Example) -> tuple[Box, ...]:
    return tuple(box for group in example.turns[-1].question_boxes for box in group)


def _answered(answer: Answerer, batch: Sequence[Example], notes: Facts) -> list[Record]:
    texts = answer(batch)
    if len(texts) != len(batch):
        raise ValueError(f"the answerer gave {len(texts)} answers to {len(batch)} examples")
    odd = next((k for k, text in enumerate(texts) if not isinstance(text, str)), None)
    if odd is not None:
        raise ValueError(f"the answer to {batch[odd].task} {batch[odd].id} is no text but {type(texts[odd]).__name__}")
    return [_record(example, text, {**example.facts, **notes}) for example, text in zip(batch, texts, strict=True)]


def _record(example: Example, text: str, facts: Facts) -> Record:
    turn = example.turns[-1]
    size = None if example.image is None else image_size(example.image)
    said = example.facts.get("width"), example.facts.get("height")
    if size is not None and None not in said and said != size:
        raise ValueError(
            f"{example.task} {example.id}: {example.image} is {size[0]} x {size[1]} pixels, but annotated as "
            f"{said[0]} x {said[1]}: boxes cannot be placed in it; give the images that were annotated"
        )
    return Record(
        id=example.id,
        task=example.task,
        image=None if example.image is None else example.image.as_posix(),
        width=None if size is None else size[0],
        height=None if size is None else size[1],
        question=turn.question,
        text=text,
        parsed=task_named(example.task).parse(text, size, facts),
        answer=turn.answer,
        boxes=_true_boxes(example),
        asked_boxes=_asked_boxes(example),
        references=example.references,
        facts=dict(facts),
    )


@lru_cache(maxsize=4096)
def image_size(path: Path) -> Size:
    """Width and height in pixels, from the file's header. Raises FileNotFoundError, or ValueError for no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (Image.UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
