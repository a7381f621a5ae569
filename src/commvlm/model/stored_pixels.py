"""Stored features in the place of pixels: training reads them, and no encoder is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .feature_store import FeatureStore, image_key
from .frozen import frozen_of
from .processing import CommImageProcessor
from .vision import CommVisionModel


class StoredPixels:
    """An image processor that looks features up: images -> pixel_values (images, 1, F), which the visual half takes as it
    takes pixels (images, P).

    stores: one per encoder, in the model's order. layers: the asked ones of each. F: all layers' patch tokens of all
    encoders, one after another; bfloat16 when every store is, which loses nothing, else float32.
    """

    def __init__(
        self, stores: Sequence[FeatureStore], layers: Sequence[Sequence[int]], pad_color: Sequence[int]
    ) -> None:
        self.stores, self.layers, self.pad_color = list(stores), list(layers), tuple(pad_color)
        halves = all(store.meta["kept"] == "bf16" for store in self.stores)
        self.dtype = torch.bfloat16 if halves else torch.float32

    def __call__(self, *, images: Sequence[Image.Image], **kwargs: Any) -> Mapping[str, Tensor]:
        keys = [image_key(image, self.pad_color) for image in images]
        rows = [
            store.rows(keys, layers, dtype=self.dtype).flatten(1)
            for store, layers in zip(self.stores, self.layers, strict=True)
        ]
        return {"pixel_values": torch.cat(rows, dim=1).unsqueeze(1)}

    def blank(self) -> Tensor:
        """(1, 1, F) zeros: what stands where there is no image."""
        pairs = zip(self.stores, self.layers, strict=True)
        total = sum(len(layers) * store.patches * store.dim for store, layers in pairs)
        return torch.zeros(1, 1, total, dtype=self.dtype)


def stored_pixels(folder: Path, model: CommVisionModel, images: CommImageProcessor) -> StoredPixels:
    """The features of every encoder of `model`, from FOLDER/NAME of each.

    Raises ValueError where a store is not there, or holds features of other weights, layers or preprocessing.
    """
    sources = frozen_of(model, images)
    stores = [FeatureStore(folder / source.name) for source in sources]
    for store, source in zip(stores, sources, strict=True):
        store.check(source)
    return StoredPixels(stores, [source.layers for source in sources], images.pad_color)
