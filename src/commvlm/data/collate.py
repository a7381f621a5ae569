"""Examples -> a batch: padded rows, or several dialogues packed behind one shared image.

Packing: the dialogues about one image begin alike (system text, image). A packed row holds that prefix once, then each
dialogue's own rest, its branch:

    row             prefix | branch 1 | branch 2 | ... | padding
    position_ids    0..p-1 | p..      | p..      |     | 0
    may look at     prefix, causally; a branch: the prefix and itself, causally; padding: itself

so every token sees what it would see in a row of its own, and the loss is the same, at one image's cost.

Layout "mask" says who may look at whom in a (b, 1, n, n) mask, which any attention takes. Layout "blocks" cuts every
branch of the batch to one length behind one prefix and says only the two numbers, for attention that skips what is
masked anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .boxes import PadSquare
from .dialogue import IGNORED, Encoded, encode_all, encode_prompt, image_id_of
from .example import IMAGE, Example
from .images import open_image

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Any]
"""Tensors by name; in layout "blocks" also the numbers prefix_length and branches."""

LAYOUTS = ("mask", "blocks")


@dataclass(frozen=True)
class Collator:
    """Groups of instructed examples -> a training batch; prompts -> a batch for `generate`.

    image_processor(images=[PIL...], return_tensors="pt")["pixel_values"] -> (images, P).
    image_tokens: how many `<image>` ids stand for one image.
    max_length: the most tokens one dialogue may have, None for no limit. Nothing is ever cut: a longer one is an error,
        since cutting takes either image tokens or supervised ones.
    layout: of packed groups, "mask" or "blocks" (see above).
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Callable[..., Mapping[str, Any]]
    image_tokens: int
    _: KW_ONLY
    max_length: int | None = None
    layout: str = "mask"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"there is no layout {self.layout!r}; layouts: {', '.join(LAYOUTS)}")

    def __call__(self, groups: Sequence[Sequence[Example]]) -> Batch:
        """A group = examples about one image = one row of the batch.

        -> input_ids, labels, position_ids (b, n) int64; attention_mask (b, n) int64, or (b, 1, n, n) bool when a group
        has several examples; pixel_values (images, P), absent without images. In layout "blocks" no mask, but
        prefix_length and branches. Raises ValueError with the example's id.
        """
        examples = [example for group in groups for example in group]
        if not groups:
            raise ValueError("the batch is empty: it needs at least one group of examples")
        for group in groups:
            _check_group(group)
        images = _opened(group[0] for group in groups)
        encoded = self._encoded(examples, images)
        if self.layout == "blocks":
            batch = _block_rows(
                groups, encoded, pad=self._pad, image_id=image_id_of(self.tokenizer) if images else None
            )
        elif all(len(group) == 1 for group in groups):
            batch = _padded_rows(encoded, pad=self._pad)
        else:
            rows = iter(zip(examples, encoded, strict=True))
            image_id = image_id_of(self.tokenizer) if images else None
            packed = [_pack([next(rows) for _ in group], image_id=image_id) for group in groups]
            batch = _packed_rows(packed, pad=self._pad)
        return batch | self._pixels([group[0] for group in groups], images)

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Left-padded prompts, each ending in "ASSISTANT:".

        -> input_ids, attention_mask (b, n) int64; pixel_values (examples with an image, P), absent without images.
        """
        images = _opened(examples)
        rows = self.prompts(examples, _sizes(images))
        length = max(len(row) for row in rows)
        input_ids = np.full((len(rows), length), self._pad, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for place, row in enumerate(rows):
            input_ids[place, length - len(row) :] = row
            mask[place, length - len(row) :] = 1
        batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
        return batch | self._pixels(examples, images)

    def prompts(self, examples: Sequence[Example], sizes: Mapping[Path, tuple[int, int]]) -> list[np.ndarray]:
        """ids (n,) int64 of every example's prompt. sizes: width and height of the examples' images, in pixels."""
        rows = []
        for example in examples:
            geometry = _geometry(example, sizes)
            ids = encode_prompt(example, self.tokenizer, image_tokens=self.image_tokens, geometry=geometry)
            self._check_length(example, len(ids))
            rows.append(ids)
        return rows

    @property
    def _pad(self) -> int:
        """Never looked at and never supervised, so any id will do where the tokenizer has none for padding."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)  # type: ignore[arg-type]

    def _encoded(self, examples: Sequence[Example], images: Mapping[Path, Image.Image]) -> list[Encoded]:
        encoded = encode_all(
            examples,
            self.tokenizer,
            image_tokens=self.image_tokens,
            geometries=[_geometry(example, _sizes(images)) for example in examples],
        )
        for example, row in zip(examples, encoded, strict=True):
            self._check_length(example, len(row.ids))
            if not (row.labels != IGNORED).any():
                raise ValueError(f"example {example.id}: has nothing supervised, it would teach nothing; drop it")
        return encoded

    def _check_length(self, example: Example, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"example {example.id}: {length} tokens ({self.image_tokens} per image) exceed max_length "
                f"{self.max_length}; raise it or drop the example, nothing is cut"
            )

    def _pixels(self, examples: Sequence[Example], images: Mapping[Path, Image.Image]) -> Batch:
        """One row for each example with an image, in order; an image that several examples show is processed once."""
        wanted = [example.image for example in examples if example.image is not None]
        if not wanted:
            return {}
        unique = {path: place for place, path in enumerate(dict.fromkeys(wanted))}
        pixels = self.image_processor(images=[images[path] for path in unique], return_tensors="pt")["pixel_values"]
        if len(unique) == len(wanted):
            return {"pixel_values": pixels}
        return {"pixel_values": pixels[torch.tensor([unique[path] for path in wanted])]}


@dataclass(frozen=True)
class _Packed:
    """One packed row. branch (n,): 0 for the shared prefix, 1, 2, ... for the branches."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    branch: np.ndarray


def _check_group(group: Sequence[Example]) -> None:
    if not group:
        raise ValueError("a group of the batch is empty: a row needs at least one example")
    odd = next((example for example in group if example.image != group[0].image), None)
    if odd is not None:
        raise ValueError(
            f"example {odd.id}: shows {odd.image}, the first of its group shows {group[0].image}; "
            "a group shares one image"
        )


def _opened(examples: Any) -> dict[Path, Image.Image]:
    """Every image once."""
    paths = dict.fromkeys(example.image for example in examples if example.image is not None)
    return {path: open_image(path) for path in paths}


def _sizes(images: Mapping[Path, Image.Image]) -> dict[Path, tuple[int, int]]:
    return {path: image.size for path, image in images.items()}


def _geometry(example: Example, sizes: Mapping[Path, tuple[int, int]]) -> PadSquare | None:
    """That of the image itself. Where the annotation says another size, its boxes would lie elsewhere: ValueError."""
    if example.image is None:
        return None
    width, height = sizes[example.image]
    said = (example.facts.get("width", width), example.facts.get("height", height))
    if said != (width, height) and any(turn.question_boxes or turn.answer_boxes for turn in example.turns):
        raise ValueError(
            f"example {example.id}: its boxes are for an image of {said[0]} x {said[1]} pixels, {example.image} has "
            f"{width} x {height}; use the images that were annotated"
        )
    return PadSquare(width, height)


def _padded_rows(rows: Sequence[Encoded], *, pad: int) -> Batch:
    """Rows padded on the right, with a 2D mask."""
    size = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = np.full(size, pad, dtype=np.int64), np.full(size, IGNORED, dtype=np.int64)
    mask = np.zeros(size, dtype=np.int64)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length], labels[place, :length], mask[place, :length] = row.ids, row.labels, 1
    positions = np.broadcast_to(np.arange(size[1]), size) * mask
    return _tensors(ids, labels, mask, positions)


def _packed_rows(rows: Sequence[_Packed], *, pad: int) -> Batch:
    """Rows padded on the right, with a 4D mask."""
    size = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = np.full(size, pad, dtype=np.int64), np.full(size, IGNORED, dtype=np.int64)
    positions, branch = np.zeros(size, dtype=np.int64), np.full(size, -1, dtype=np.int16)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length], labels[place, :length] = row.ids, row.labels
        positions[place, :length], branch[place, :length] = row.positions, row.branch
    return _tensors(ids, labels, _branch_mask(branch)[:, None], positions)


def _tensors(ids: np.ndarray, labels: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> Batch:
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _block_rows(
    groups: Sequence[Sequence[Example]], encoded: Sequence[Encoded], *, pad: int, image_id: int | None
) -> Batch:
    """Every group as prefix_length + branches x n ids: one prefix for the whole batch, branches padded to one length n."""
    prefix = _shared(encoded)
    if image_id is not None:
        late = next((i for i, row in enumerate(encoded) if (row.ids[prefix:] == image_id).any()), None)
        if late is not None:
            example = [example for group in groups for example in group][late]
            raise ValueError(
                f"example {example.id}: its image does not stand where the others' do; put {IMAGE} in front"
            )
    branches, length = max(len(group) for group in groups), max(len(row.ids) for row in encoded) - prefix
    size = (len(groups), prefix + branches * length)
    ids, labels = np.full(size, pad, dtype=np.int64), np.full(size, IGNORED, dtype=np.int64)
    rows = iter(encoded)
    for place, group in enumerate(groups):
        for number in range(len(group)):
            row, start = next(rows), prefix + number * length
            rest = slice(start, start + len(row.ids) - prefix)
            ids[place, :prefix] = row.ids[:prefix]
            ids[place, rest], labels[place, rest] = row.ids[prefix:], row.labels[prefix:]
    positions = np.concatenate([np.arange(prefix), np.tile(prefix + np.arange(length), branches)])
    arrays = {"input_ids": ids, "labels": labels, "position_ids": np.tile(positions, (len(groups), 1))}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return tensors | {"prefix_length": prefix, "branches": branches}


def _branch_mask(branch: np.ndarray) -> np.ndarray:
    """branch (b, n), -1 for padding -> (b, n, n) bool, True where the row's token may look at the column's.

    A token sees itself and what stands before it in the prefix or in its own branch. Padding sees itself alone, which
    keeps its softmax finite.
    """
    length = branch.shape[1]
    asks, seen = branch[:, :, None], branch[:, None, :]
    mask = (seen == asks) | (seen == 0)
    mask &= asks >= 0
    mask &= np.tri(length, dtype=bool)
    places = np.arange(length)
    mask[:, places, places] = True
    return mask


def _pack(rows: Sequence[tuple[Example, Encoded]], *, image_id: int | None) -> _Packed:
    """Dialogues about one image -> their shared prefix once, then each one's rest."""
    encoded = [row for _, row in rows]
    length = _shared(encoded)
    first = encoded[0]
    if image_id is not None and (first.ids[length:] == image_id).any():
        names = ", ".join(example.id for example, _ in rows)
        raise ValueError(f"examples {names}: differ before their image, so they cannot share it; put {IMAGE} in front")
    rests = [len(row.ids) - length for row in encoded]
    return _Packed(
        ids=np.concatenate([first.ids[:length], *(row.ids[length:] for row in encoded)]),
        labels=np.concatenate([first.labels[:length], *(row.labels[length:] for row in encoded)]),
        positions=np.concatenate([np.arange(length), *(length + np.arange(rest) for rest in rests)]),
        branch=np.repeat(np.arange(len(encoded) + 1, dtype=np.int16), [length, *rests]),
    )


def _shared(rows: Sequence[Encoded]) -> int:
    """Length of the longest common prefix that leaves every branch a first token without supervision.

    That first token would be predicted from the last token of the branch before it, so it must not be supervised.
    """
    first = rows[0].ids
    length = len(first)
    for row in rows:
        supervised = int(np.argmax(row.labels != IGNORED))
        length = min(length, len(row.ids), supervised - 1)
        differs = np.flatnonzero(row.ids[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return max(length, 0)
