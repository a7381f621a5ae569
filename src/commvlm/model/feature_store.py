"""Features of frozen encoders on disk: one pass of an encoder serves every layer, merge, task and run.

FOLDER/store.json              what the features depend on (`frozen.FrozenEncoder.identity`), and how they are kept
FOLDER/shard-00000.safetensors features (images, layers, N, d), their scales in int8, the images' keys in its metadata
FOLDER/lock                    held by the process that writes

An image's key is the hash of its pixels, so nothing depends on where files lie, and a changed image is another image. Shards
are written under a temporary name and renamed; a pass that was stopped goes on behind the last whole one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .frozen import FrozenEncoder, difference
from .processing import to_rgb

OPEN_SHARDS = 64
"""Files held open at once by a reader."""


@dataclass(frozen=True)
class Kept:
    """How values are kept. pack: float32 (b, N, d) -> named tensors; unpack: those -> float32 (b, ..., N, d)."""

    pack: Callable[[Tensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor]], Tensor]


def _pack_int8(state: Tensor) -> dict[str, Tensor]:
    scale = state.abs().amax(-2, keepdim=True).clamp_min(1e-30) / 127
    return {"features": (state / scale).round().to(torch.int8), "scale": scale}


KEPT: dict[str, Kept] = {
    "fp32": Kept(lambda state: {"features": state}, lambda kept: kept["features"]),
    "bf16": Kept(lambda state: {"features": state.to(torch.bfloat16)}, lambda kept: kept["features"].float()),
    "int8": Kept(_pack_int8, lambda kept: kept["features"].float() * kept["scale"]),
}
"""fp32: as computed. bf16: each value to 2^-8 of itself (0.4 percent). int8: each value to 1/254 of the largest magnitude
that its channel has in that image and layer; a scale per image, layer and channel."""


def image_key(image: Image.Image, pad_color: Sequence[int] = (255, 255, 255)) -> str:
    """The hash of a picture's size and RGB pixels."""
    red, green, blue = pad_color
    rgb = to_rgb(image, background=(red, green, blue))
    digest = hashlib.blake2b(f"{rgb.width}x{rgb.height}".encode(), digest_size=16)
    digest.update(rgb.tobytes())
    return digest.hexdigest()


class FeatureStore:
    """The features in a folder. layers: 1-based; patches, dim: N and d of `rows`. It pickles as its path.

    Raises ValueError for a folder that is no store, or whose files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            self.identity: dict[str, Any] = self.meta["identity"]
            self.kept = KEPT[self.meta["kept"]]
            self.patches, self.dim = self.meta["patches"], self.meta["dim"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is no store of features; make one with commvlm probe features") from error
        self.layers: tuple[int, ...] = tuple(self.identity["layers"])
        self.places: dict[str, tuple[Path, int]] = {}
        for shard in sorted(folder.glob("shard-*.safetensors")):
            self._admit(shard)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_open_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def check(self, source: FrozenEncoder) -> None:
        """Raises ValueError where the features are not those of `source`, saying why."""
        why = difference(self.identity, source.identity())
        if why is not None:
            raise ValueError(
                f"{self.folder} holds features of another encoder than {source.name!r} ({why}); "
                "make them again in another folder"
            )

    def rows(
        self, keys: Sequence[str], layers: Sequence[int] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(keys, layers, N, d). Raises ValueError for a key or a layer that is not there."""
        places = torch.tensor([self._place(layer) for layer in (self.layers if layers is None else layers)])
        first, last = int(places.min()), int(places.max())
        out = torch.empty(len(keys), len(places), self.patches, self.dim, dtype=dtype)
        for row, key in enumerate(keys):
            shard, number = self._of(key)
            out[row] = self._read(shard, number, number + 1, slice(first, last + 1))[0, places - first]
        return out

    def layer(self, layer: int, keys: Sequence[str]) -> Tensor:
        """(keys, N, d) float32: one layer of many images, each shard read once."""
        place = self._place(layer)
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for row, key in enumerate(keys):
            shard, number = self._of(key)
            wanted.setdefault(shard, []).append((row, number))
        out = torch.empty(len(keys), self.patches, self.dim)
        for shard, pairs in wanted.items():
            rows, numbers = (torch.tensor(column) for column in zip(*pairs, strict=True))
            first, last = int(numbers.min()), int(numbers.max())
            out[rows] = self._read(shard, first, last + 1, slice(place, place + 1))[numbers - first, 0]
        return out

    def _read(self, shard: Path, start: int, end: int, places: slice) -> Tensor:
        """(images, layers, N, d) float32 of a shard's images and places of layers."""
        file = self._open(shard)
        return self.kept.unpack({name: file.get_slice(name)[start:end, places] for name in file.keys()})  # noqa: SIM118

    def _place(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"{self.folder} has no layer {layer}, only {list(self.layers)}")
        return self.layers.index(layer)

    def _of(self, key: str) -> tuple[Path, int]:
        if key not in self.places:
            raise ValueError(
                f"{self.folder} has no features of an image that is asked for (its pixels' hash is {key}); "
                "run commvlm probe features again with the same data"
            )
        return self.places[key]

    def _admit(self, shard: Path) -> None:
        keys = _open_shard(shard).metadata()["images"].split()
        self.places.update({key: (shard, number) for number, key in enumerate(keys)})


def _open_shard(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{shard} is damaged; remove it and run commvlm probe features again, which fills the gap"
        ) from error
