"""Examples -> a batch: images opened once, dialogues encoded, rows put together (see `packing`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .boxes import SHIKRA3, Codec
from .dialogue import IGNORED, Encoded, encode_all, encode_prompt, image_id_of
from .example import Example
from .geometry import GEOMETRIES, View
from .images import OPENERS
from .packing import Batch, joined_row, pack, packed_rows, padded_rows
from .templates import SYSTEM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS = ("mask", "joined")
Spare = Callable[[Sequence[Example], ValueError, int], Sequence[Example]]
"""A group that cannot be used, why, and how many were tried before -> another group; it may raise instead."""


@dataclass(frozen=True)
class Collator:
    """Groups of instructed examples -> a training batch; prompts -> a batch for `generate`.

    image_processor(images=[PIL...], return_tensors="pt")["pixel_values"] -> (images, P).
    image_tokens: how many `<image>` ids stand for one image.
    max_length: the most tokens one dialogue may have, None for no limit. Nothing is ever cut: a longer one is an error,
        since cutting takes either image tokens or supervised ones.
    layout: of packed groups, "mask" or "joined" (see `packing`).
    geometry: what the image processor shows of an image, so that boxes are written for it. codec: how they are written.
    pixels: what is shown of an image (`images.OPENERS`).
    spare: gives another group for one that cannot be used (a broken image, too long); None refuses the batch.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Callable[..., Mapping[str, Any]]
    image_tokens: int
    _: KW_ONLY
    max_length: int | None = None
    layout: str = "mask"
    geometry: str = "pad-square"
    codec: Codec = SHIKRA3
    pixels: str = "given"
    spare: Spare | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"there is no layout {self.layout!r}; layouts: {', '.join(LAYOUTS)}")
        if self.pixels not in OPENERS:
            raise ValueError(f"pixels is {self.pixels!r}; valid: {', '.join(OPENERS)}")
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"there is no geometry {self.geometry!r}; geometries: {', '.join(GEOMETRIES)}")

    def __call__(self, groups: Sequence[Sequence[Example]]) -> Batch:
        """A group = examples about one image = one row of the batch.

        -> input_ids, labels, position_ids (b, n) int64; attention_mask (b, n) int64, or (b, 1, n, n) bool when a group
        has several examples; pixel_values (images, P), absent without images. In layout "joined" one row, no mask, but
        segments. Raises ValueError with the example's id.
        """
        if not groups:
            raise ValueError("the batch is empty: it needs at least one group of examples")
        try:
            images, encoded = self._encoded(groups)
        except ValueError:
            if self.spare is None:
                raise
            groups = [self._usable(group) for group in groups]
            images, encoded = self._encoded(groups)
        image_id = image_id_of(self.tokenizer) if images else None
        if self.layout == "mask" and all(len(group) == 1 for group in groups):
            batch = padded_rows(encoded, pad=self._pad)
        else:
            rows = iter(zip([example for group in groups for example in group], encoded, strict=True))
            packed = [pack([next(rows) for _ in group], image_id=image_id) for group in groups]
            batch = joined_row(packed) if self.layout == "joined" else packed_rows(packed, pad=self._pad)
        return batch | self._pixels([group[0] for group in groups], images)

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Left-padded prompts, each ending in "ASSISTANT:".

        -> input_ids, attention_mask (b, n) int64; pixel_values (examples with an image, P), absent without images.
        """
        images = self.opened(examples)
        rows = self.prompts(examples, images)
        length = max(len(row) for row in rows)
        input_ids = np.full((len(rows), length), self._pad, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for place, row in enumerate(rows):
            input_ids[place, length - len(row) :] = row
            mask[place, length - len(row) :] = 1
        batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
        return batch | self._pixels(examples, images)

    def prompts(
        self, examples: Sequence[Example], images: Mapping[Path, Image.Image], *, system: str = SYSTEM
    ) -> list[np.ndarray]:
        """ids (n,) int64 of every example's prompt, not padded. images: those of the examples, opened. system: the text
        before the first turn."""
        rows = []
        for example in examples:
            view = self._view(example, images)
            ids = encode_prompt(
                example, self.tokenizer, image_tokens=self.image_tokens, geometry=view, codec=self.codec, system=system
            )
            self._check_length(example, len(ids))
            rows.append(ids)
        return rows

    def opened(self, examples: Iterable[Example]) -> dict[Path, Image.Image]:
        """Every image once, as it is shown."""
        paths = dict.fromkeys(example.image for example in examples if example.image is not None)
        return {path: OPENERS[self.pixels](path) for path in paths}

    @property
    def _pad(self) -> int:
        """Never looked at and never supervised, so any id will do where the tokenizer has none for padding."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)  # type: ignore[arg-type]

    def _encoded(self, groups: Sequence[Sequence[Example]]) -> tuple[dict[Path, Image.Image], list[Encoded]]:
        """The groups' images, and every example's ids and labels, all in one call of the tokenizer."""
        for group in groups:
            _check_group(group)
        images = self.opened(group[0] for group in groups)
        examples = [example for group in groups for example in group]
        encoded = encode_all(
            examples,
            self.tokenizer,
            image_tokens=self.image_tokens,
            geometries=[self._view(example, images) for example in examples],
            codec=self.codec,
        )
        for example, row in zip(examples, encoded, strict=True):
            self._check_length(example, len(row.ids))
            if not (row.labels != IGNORED).any():
                raise ValueError(f"example {example.id}: has nothing supervised, it would teach nothing; drop it")
        return images, encoded

    def _usable(self, group: Sequence[Example]) -> Sequence[Example]:
        """The group itself, or the first spare one that can be used."""
        assert self.spare is not None
        tried = 0
        while True:
            try:
                self._encoded([group])
                return group
            except ValueError as error:
                group = self.spare(group, error, tried)
                tried += 1

    def _view(self, example: Example, images: Mapping[Path, Image.Image]) -> View | None:
        """Of the image itself. Where the annotation says another size, its boxes would lie elsewhere: ValueError."""
        if example.image is None:
            return None
        width, height = images[example.image].size
        said = (example.facts.get("width", width), example.facts.get("height", height))
        if said != (width, height) and any(turn.boxes or turn.points for turn in example.turns):
            raise ValueError(
                f"example {example.id}: its boxes are for an image of {said[0]} x {said[1]} pixels, {example.image} has "
                f"{width} x {height}; use the images that were annotated"
            )
        return GEOMETRIES[self.geometry](width, height)

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


def _check_group(group: Sequence[Example]) -> None:
    if not group:
        raise ValueError("a group of the batch is empty: a row needs at least one example")
    odd = next((example for example in group if example.image != group[0].image), None)
    if odd is not None:
        raise ValueError(
            f"example {odd.id}: shows {odd.image}, the first of its group shows {group[0].image}; "
            "a group shares one image"
        )
