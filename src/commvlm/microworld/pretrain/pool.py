"""A pool of rendered scenes on disk for pretraining: drawn once, read by every trainer through a memory map."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from rich.progress import track

from ..scene import SIDE, Scene, render, sample_scene


def scene_pool(
    folder: Path, size: int, difficulty: str = "easy", split: str = "pretrain"
) -> tuple[list[Scene], np.ndarray]:
    """`size` scenes of a split and their pixels, uint8 (size, 64, 64, 3), read-only. Draws those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [sample_scene(split, i, difficulty) for i in range(size)]
    path = folder / f"{split}-{difficulty}-{size}.npy"
    if not path.exists():
        part = path.with_suffix(f".part{os.getpid()}")
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(size, SIDE, SIDE, 3))
        for i in track(range(size), description=f"drawing {size} {difficulty} scenes"):
            pixels[i] = render(scenes[i], difficulty)
        pixels.flush()
        os.replace(part, path)
    return scenes, np.load(path, mmap_mode="r")
