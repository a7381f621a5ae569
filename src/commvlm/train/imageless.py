"""Batches without an image, in which the visual branches would have no part.

Processes that share gradients or weights wait for each other in every module. So a batch without an image gets one row
more: a grey image and nothing supervised. Its gradient is exactly zero, and no process waits for one that has no image.
The trainer is told by the key STAND_IN, and BatchNorms gather nothing from it.
Where features are read in place of pixels it is features, zeros, so that it runs no encoder that others do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..data.collate import Collator
from ..data.dialogue import IGNORED
from ..data.example import Example
from ..data.packing import Batch

STAND_IN = "stand_in"
"""The key of a batch whose only image stands in for none."""


@dataclass(frozen=True)
class EveryBranch:
    """A collator whose batches always hold an image. pixels: (1, P), a grey one, or (1, 1, F), features that are zero."""

    collator: Collator
    image_id: int
    pixels: torch.Tensor

    def __call__(self, groups: list[list[Example]]) -> Batch:
        """As the collator's; without images (b + 1, n) with n at least the image's tokens, and `pixels`; marked."""
        batch = self.collator(groups)
        return batch if "pixel_values" in batch else self._with_grey(batch) | {STAND_IN: True}

    def _with_grey(self, batch: Batch) -> Batch:
        tokens = self.collator.image_tokens
        if "segments" in batch:
            return self._joined(batch, torch.arange(tokens)[None])
        longer = max(0, tokens - batch["input_ids"].shape[1])
        fill = {"labels": IGNORED}
        rows = {name: pad(batch[name], (0, longer), value=fill.get(name, 0)) for name in ("input_ids", "labels")}
        rows |= {name: pad(batch[name], (0, longer)) for name in ("attention_mask", "position_ids")}
        length = rows["input_ids"].shape[1]
        place = torch.arange(length)
        shown = place < tokens
        row = {
            "input_ids": torch.where(shown, self.image_id, 0),
            "labels": torch.full_like(place, IGNORED),
            "attention_mask": shown.long(),
            "position_ids": place * shown,
        }
        return {name: torch.cat([rows[name], row[name][None]]) for name in row} | {"pixel_values": self.pixels}

    def _joined(self, batch: Batch, places: torch.Tensor) -> Batch:
        """One row without padding, and behind it the grey image as one of its own."""
        row = {
            "input_ids": torch.full_like(places, self.image_id),
            "labels": torch.full_like(places, IGNORED),
            "position_ids": places,
        }
        rows: Batch = {name: torch.cat([batch[name], row[name]], dim=1) for name in row}
        return rows | {"segments": [*batch["segments"], [places.shape[1]]], "pixel_values": self.pixels}
