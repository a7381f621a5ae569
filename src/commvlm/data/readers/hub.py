"""Folders of the `datasets` library: Parquet and Arrow files, or what `save_to_disk` wrote, read row by row.

The columns go by roles. Images stand in the rows (as the library stores them: bytes, and a name) or are named there; those in
the rows are written to `images` once, by their names and the hash of their bytes, so that everything else sees files.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..convention import Convention, convention_of
from ..example import Example, Turn
from ..image_keys import written_name
from ..templates import variants
from .entry import Entry, EntryError, Read, made, numbered
from .refer import referring
from .sharegpt import dialogue_of

ROLES = ("image", "question", "answer", "answers", "conversations", "box", "id")
REFER = ("rec", "reg", "gc")
_NUMBER = re.compile(r"(?:^|[-_])\d+(?:-of-\d+(?:-[0-9a-f]+)?)?$")
"""Which of several files of a split one is: `-00000-of-00002`, with a hash behind it in older sets, or a number alone."""
_ENDINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def read_hub(
    *, images: Path, dataset: Path, task: str = "dialogue", split: str | None = None,
    columns: dict[str, str] | None = None, boxes: str = "xyxy-pixels",
) -> Read:  # fmt: skip
    """One example a row. task: "dialogue" (column conversations), "caption" (answer), "rec", "reg", "gc" (answer: the
    expression, and box), or any with a question and an answer. Several expressions of a row are as many questions of rec, and
    references of one of reg or gc.

    columns: role -> column's name, where they differ; roles: image, question, answer, answers, conversations, box, id. A list
    in answer or answers (of texts, or VQAv2's objects with an answer each) gives the references, and the most frequent is the
    answer. split: must be named where the folder has several; `train` is in train.parquet, train-00000-of-00002.parquet, ...
    and train/0000.parquet. boxes: convention of the box column, and of boxes in conversations.
    """
    given = columns or {}
    # Of answer and answers the one that is named counts, though the set may have a column of the other's name.
    rival = {"answer": "answers", "answers": "answer"}
    named = {role: role for role in ROLES if not (rival.get(role) in given and role not in given)} | given
    unknown = sorted(set(named) - set(ROLES))
    if unknown:
        raise ValueError(f"datasets: there is no role {unknown[0]!r}; roles: {', '.join(ROLES)}")
    if task != "dialogue":
        try:
            variants(task)
        except KeyError as error:
            raise ValueError(f"datasets: there is no task {task!r}") from error
    convention = convention_of(boxes)

    def make(row: Entry) -> Example | list[Example]:
        image = _image(row, images)
        return _referred(row, image, task, convention) if task in REFER else _example(row, image, task, convention)

    yield from made(_renamed(numbered(_rows(dataset, split), f"{dataset.name}: row", dataset.name), named), make)


def _rows(dataset: Path, split: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows as they are stored: images are not decoded, and no more than a few rows are in memory."""
    from datasets import Image, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    if not dataset.is_dir():
        raise ValueError(f"{dataset}: there is no such annotation file or folder of datasets")
    try:
        if (dataset / "dataset_dict.json").is_file() or (dataset / "state.json").is_file():
            found: Any = load_from_disk(str(dataset / split) if split and (dataset / split).is_dir() else str(dataset))
            if not hasattr(found, "features"):
                raise ValueError(f"{dataset}: has the splits {', '.join(found)}; name one")
            found = found.to_iterable_dataset()
        else:
            kind, files = _files(dataset, split)
            found = load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=True)
        for name, feature in (found.features or {}).items():
            if isinstance(feature, Image):
                found = found.cast_column(name, Image(decode=False))
        yield from found
    except (DatasetsError, ArrowException, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{dataset}: is no folder of datasets, or a damaged one ({error})".splitlines()[0]) from error


def _files(dataset: Path, split: str | None) -> tuple[str, list[Path]]:
    for kind in ("parquet", "arrow"):
        files = sorted(path for path in dataset.rglob(f"*.{kind}"))
        names = ", ".join(sorted({_split(path) for path in files}))
        chosen = [path for path in files if split in (None, _split(path))]
        if files and not chosen:
            raise ValueError(f"{dataset}: has no split {split!r}; it has {names}")
        if len({_split(path) for path in chosen}) > 1:
            raise ValueError(f"{dataset}: has the splits {names}; name one")
        folders = sorted({str(path.parent.relative_to(dataset)) for path in chosen})
        if len(folders) > 1:
            raise ValueError(
                f"{dataset}: has files of one split in the folders {', '.join(folders)}; name one as dataset"
            )
        if chosen:
            return kind, chosen
    raise ValueError(f"{dataset}: holds no Parquet or Arrow file")


def _split(path: Path) -> str:
    """What a file's name says before its number among several; a name that is only a number has its folder's."""
    return _NUMBER.sub("", path.stem) or path.parent.name


def _renamed(rows: Iterator[Entry | EntryError], named: Mapping[str, str]) -> Iterator[Entry | EntryError]:
    for row in rows:
        if isinstance(row, Entry):
            kept = {**named, "messages": "messages", "width": "width", "height": "height"}
            row.value = {role: row.value[name] for role, name in kept.items() if row.value.get(name) is not None}
        yield row


def _image(row: Entry, images: Path) -> Path | None:
    """The row's image as a file, written when it is not there yet."""
    if not row.has("image"):
        return None
    value = row.raw("image")
    if isinstance(value, str):
        return row.image(images, value)
    if not isinstance(value, dict) or not isinstance(value.get("bytes"), bytes):
        name = value.get("path") if isinstance(value, dict) else None
        if isinstance(name, str):
            return row.image(images, name)
        raise row.error("has an image that is neither a name nor bytes")
    content = value["bytes"]
    ending = next((end for start, end in _ENDINGS.items() if content.startswith(start)), ".img")
    said = value.get("path")
    path = images / written_name(content, said if isinstance(said, str) else None, ending)
    if not path.is_file():
        images.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(content)
        os.replace(part, path)
    return path


def _example(row: Entry, image: Path | None, task: str, convention: Convention) -> Example:
    if task == "dialogue":
        # As in LLaVA's files, where the id is the image's and stands in several entries.
        facts = {"entry_id": row.key("id")} if row.has("id") else {}
        return Example(row.id, task, image, dialogue_of(row, image, convention), facts={**facts, **row.size()})
    answer, references = _answers(row)
    question = "" if task == "caption" else row.plain("question")
    return Example(_id(row), task, image, (Turn(question, answer),), references=references)


def _referred(row: Entry, image: Path | None, task: str, convention: Convention) -> list[Example]:
    """A row's expressions and its box."""
    id, (answer, references) = _id(row), _answers(row)
    if image is None:
        raise row.error("has a box but no image")
    numbers = row.numbers("box")
    if len(numbers) == 4:
        scaled = convention.unit != "pixels"
        size = (row.integer("width"), row.integer("height")) if scaled else (1, 1)
        numbers = list(convention.pixels(numbers, *size))
    box = row.corners(numbers, "box")
    asked: dict[str, Any] = {"task": task, "facts": row.size()}
    if task != "rec":
        return [replace(referring(id, image, answer, box, **asked), references=references)]
    texts = [row.without_slots(text, "answer") for text in dict.fromkeys(references) if text.strip()]
    ids = [id] if len(texts) == 1 else [f"{id}:{k}" for k in range(len(texts))]
    return [referring(name, image, text, box, **asked) for name, text in zip(ids, texts, strict=True)]


def _id(row: Entry) -> str:
    return str(row.key("id")) if row.has("id") else row.id


def _answers(row: Entry) -> tuple[str, tuple[str, ...]]:
    value = row.raw("answers" if row.has("answers") else "answer")
    if isinstance(value, dict):  # a list of objects, as some versions of the library hand it over: by columns
        value = value.get("answer")
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list):
        texts: Any = [text.get("answer") if isinstance(text, dict) else text for text in texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise row.error("has an answer that is neither a text nor a list of texts")
    answer = Counter(texts).most_common(1)[0][0]
    if not answer.strip():
        raise row.error("has a blank answer")
    return row.without_slots(answer, "answer"), tuple(texts)
