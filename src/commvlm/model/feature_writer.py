"""Filling a store of features: one pass of a frozen encoder over images, resumable, shard by shard."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from .feature_store import KEPT, FeatureStore, Kept, image_key
from .frozen import COMPUTED, FrozenEncoder
from .names import choice
from .storage import write_text, writing

VERSION = 1
SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0
"""A shard is written when it has so many bytes, or when its first image is so old: what a kill can cost."""


def store_features(
    folder: Path,
    source: FrozenEncoder,
    images: Iterable[Image.Image],
    *,
    kept: str = "bf16",
    computed: str = "fp32",
    batch: int = 32,
) -> FeatureStore:
    """Writes the features of those images that the folder lacks, `batch` at once, and opens it.

    kept: a row of `KEPT`. computed: one of `frozen.COMPUTED`. An interrupted call is simply repeated. Raises ValueError
    where the folder holds features of other weights, layers or preprocessing, or another process writes there; OSError when
    the disk is full.
    """
    choice(kept, of=tuple(KEPT), what="kept")
    choice(computed, of=COMPUTED, what="computed")
    with writing(folder), _locked(folder):
        store = _claim(folder, source, kept=kept, computed=computed)
        shard = _Shard(store)
        for keys, waiting in _batches(images, store, batch=batch, pad_color=source.images.pad_color):
            if store.layers != source.layers:
                raise ValueError(
                    f"{folder} lacks images and holds layers {list(store.layers)}; add them with those, not with "
                    f"{list(source.layers)}"
                )
            shard.add(keys, _packed(source, waiting, KEPT[kept], computed))
        shard.write()
    return FeatureStore(folder)


def _packed(source: FrozenEncoder, images: Sequence[Image.Image], kept: Kept, computed: str) -> dict[str, Tensor]:
    """Each named tensor with the layers along its second axis."""
    layers: list[dict[str, Tensor]] = []

    def take(_place: int, state: Tensor) -> None:
        layers.append({name: value.cpu() for name, value in kept.pack(state.float()).items()})

    source.stream(images, take, computed=computed)
    return {name: torch.stack([layer[name] for layer in layers], dim=1) for name in layers[0]}


def _batches(
    images: Iterable[Image.Image], store: FeatureStore, *, batch: int, pad_color: Sequence[int]
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Keys and pictures of what is not stored yet, each once."""
    seen: set[str] = set()
    keys: list[str] = []
    waiting: list[Image.Image] = []
    for image in images:
        key = image_key(image, pad_color)
        if key in store or key in seen:
            continue
        seen.add(key)
        keys.append(key)
        waiting.append(image)
        if len(keys) == batch:
            yield keys, waiting
            keys, waiting = [], []
    if keys:
        yield keys, waiting


class _Shard:
    """What is computed and not yet written."""

    def __init__(self, store: FeatureStore) -> None:
        self.folder = store.folder
        taken = [int(path.stem.removeprefix("shard-")) for path in self.folder.glob("shard-*.safetensors")]
        self.number = max(taken, default=-1) + 1
        self._clear()

    def _clear(self) -> None:
        self.keys: list[str] = []
        self.parts: list[dict[str, Tensor]] = []
        self.bytes, self.begun = 0, time.monotonic()

    def add(self, keys: Sequence[str], packed: dict[str, Tensor]) -> None:
        if not self.keys:
            self.begun = time.monotonic()
        self.keys += keys
        self.parts.append(packed)
        self.bytes += sum(tensor.nbytes for tensor in packed.values())
        if self.bytes >= SHARD_BYTES or time.monotonic() - self.begun >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """The shard under a temporary name, then renamed."""
        if not self.keys:
            return
        final = self.folder / f"shard-{self.number:05d}.safetensors"
        part = final.with_suffix(".part")
        tensors = {name: torch.cat([packed[name] for packed in self.parts]) for name in self.parts[0]}
        try:
            save_file(tensors, part, metadata={"images": " ".join(self.keys)})
            os.replace(part, final)
        finally:
            part.unlink(missing_ok=True)
        self.number += 1
        self._clear()


def _claim(folder: Path, source: FrozenEncoder, *, kept: str, computed: str) -> FeatureStore:
    """The folder as this encoder's store, made when it is empty. Raises ValueError for another's."""
    path = folder / "store.json"
    if not path.exists():
        if any(entry.name not in ("lock", "store.part") for entry in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no store of features; choose another folder")
        said = {"version": VERSION, "kept": kept, "computed": computed, "patches": source.patches, "dim": source.dim}
        write_text(path, json.dumps({**said, "identity": source.identity()}, indent=1))
    store = FeatureStore(folder)
    store.check(source)
    for name, now in (("kept", kept), ("computed", computed), ("version", VERSION)):
        if store.meta[name] != now:
            raise ValueError(f"{folder} was made with {name} {store.meta[name]}, not {now}; choose another folder")
    return store


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises ValueError while another process holds the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another process is writing features there; wait for it, then repeat"
            ) from error
        yield
