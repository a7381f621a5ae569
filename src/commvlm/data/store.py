"""Examples on disk, found by number: opened in no time, read row by row, nothing held in memory.

FOLDER/examples.arrow    id, task, image's number, and the rest as JSON; Arrow's IPC file, in batches of BATCH rows
FOLDER/images.arrow      names of the images, under the folder of images
FOLDER/codes.npy         every example's image number again, for those who want them all; -1 for none
FOLDER/meta.json         how many, what was skipped, and what the store was made from

Rows are read with `pread`, not through a memory map: an epoch over a large store leaves the process as small as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .example import Example, Turn

BATCH = 128
"""Rows of a batch: what is read to get at one of them."""
VERSION = 1
SCHEMA = pa.schema([("id", pa.string()), ("task", pa.string()), ("image", pa.int32()), ("rest", pa.string())])


class Stored(Sequence[Example]):
    """The examples of a store. images: the folder that the images' names are under.

    It pickles as its two paths, and forked workers may share it. Raises ValueError for a folder that is no store.
    """

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        self.images = images
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._names = _strings(folder / "images.arrow")
            self._file = pa.OSFile(str(folder / "examples.arrow"))
            self._rows = pa.ipc.open_file(self._file)
        except (OSError, pa.ArrowInvalid, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: is no store of examples, or a damaged one; prepare it again") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.folder, self.images)

    def __len__(self) -> int:
        return self.meta["examples"]

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a store of {len(self)}")
        batch, row = divmod(index % len(self), BATCH)
        return self._example(self._rows.get_batch(batch), row)

    def __iter__(self) -> Iterator[Example]:
        for number in range(self._rows.num_record_batches):
            batch = self._rows.get_batch(number)
            for row in range(batch.num_rows):
                yield self._example(batch, row)

    def codes(self) -> np.ndarray:
        """(n,) int32: the number of each example's image, -1 for none."""
        return np.load(self.folder / "codes.npy", mmap_mode="r")

    def names(self) -> list[Path]:
        """The images by number."""
        return [self.images / name for name in self._names.to_pylist()]

    def _example(self, batch: pa.RecordBatch, row: int) -> Example:
        id, task, image, rest = (column[row].as_py() for column in batch.columns)
        turns, references, facts = json.loads(rest)
        path = None if image < 0 else self.images / self._names[image].as_py()
        return Example(id, task, path, tuple(_turn(*turn) for turn in turns), tuple(references), facts)


class Kept(Sequence[Example]):
    """Some of the examples of a longer sequence, by their places in it."""

    def __init__(self, examples: Sequence[Example], places: np.ndarray) -> None:
        self.examples = examples
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self.examples[int(self.places[index])]


def write_store(folder: Path, examples: Iterable[Example], images: Path, meta: dict[str, Any]) -> int:
    """Writes a store whole or not at all: under a temporary name, then renamed. Returns how many examples it has.

    meta: kept in meta.json; it is taken when all examples are written, so their reading may still fill it.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    numbers: dict[str, int] = {}
    codes: list[np.ndarray] = []
    with pa.OSFile(str(part / "examples.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in _batches(examples):
            shown = [_number(example, images, numbers) for example in batch]
            columns = [
                pa.array([example.id for example in batch]),
                pa.array([example.task for example in batch]),
                pa.array(shown, type=pa.int32()),
                pa.array([_rest(example) for example in batch]),
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            codes.append(np.array(shown, dtype=np.int32))
    every = np.concatenate(codes) if codes else np.zeros(0, dtype=np.int32)
    np.save(part / "codes.npy", every)
    table = pa.table({"name": pa.array(list(numbers), type=pa.string())})
    with pa.OSFile(str(part / "images.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (part / "meta.json").write_text(json.dumps({"version": VERSION, "examples": len(every), **meta}, indent=1))
    for file in part.iterdir():
        with file.open("rb+") as written:
            os.fsync(written.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return len(every)


def image_codes(examples: Sequence[Example]) -> tuple[list[Path], np.ndarray]:
    """The images of examples in order of their first appearance, and (n,) each example's among them, -1 for none."""
    if isinstance(examples, Stored):
        return examples.names(), examples.codes()
    if isinstance(examples, Kept):
        names, codes = image_codes(examples.examples)
        return names, np.asarray(codes)[examples.places]
    numbers: dict[Path, int] = {}
    codes = [-1 if e.image is None else numbers.setdefault(e.image, len(numbers)) for e in examples]
    return list(numbers), np.array(codes, dtype=np.int64)


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _number(example: Example, images: Path, numbers: dict[str, int]) -> int:
    if example.image is None:
        return -1
    return numbers.setdefault(example.image.relative_to(images).as_posix(), len(numbers))


def _rest(example: Example) -> str:
    turns = [
        (t.question, t.answer, t.question_boxes, t.answer_boxes, t.question_points, t.answer_points)
        for t in example.turns
    ]
    return json.dumps([turns, example.references, dict(example.facts)], ensure_ascii=False, separators=(",", ":"))


def _turn(question: str, answer: str, *places: list[list[list[float]]]) -> Turn:
    return Turn(question, answer, *(tuple(tuple(map(tuple, group)) for group in groups) for groups in places))  # type: ignore[arg-type]


def _strings(path: Path) -> pa.ChunkedArray:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()["name"]
