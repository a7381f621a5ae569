"""A pool of rendered scenes on disk for pretraining: drawn once, read by every trainer through a memory map."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track

from ..scene import SIDE, Scene, render, sample_scene

LOOKS = 10**6
"""Apart by so many indices, the same objects are drawn under another light: background, clutter, shades and noise differ."""


def scene_pool(
    folder: Path, size: int, difficulty: str = "easy", split: str = "pretrain", look: int = 0
) -> tuple[list[Scene], np.ndarray]:
    """`size` scenes of a split and their pixels, uint8 (size, 64, 64, 3), read-only. Draws those that are missing.

    look: which drawing of the same objects; 0 is the scenes' own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [sample_scene(split, i, difficulty) for i in range(size)]
    path = folder / f"{split}-{difficulty}-{size}{f'-look{look}' if look else ''}.npy"
    if not path.exists():
        part = path.with_suffix(f".part{os.getpid()}")
        pixels = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(size, SIDE, SIDE, 3))
        for i in track(range(size), description=f"drawing {size} {difficulty} scenes"):
            pixels[i] = render(replace(scenes[i], index=i + look * LOOKS), difficulty)
        pixels.flush()
        os.replace(part, path)
    return scenes, np.load(path, mmap_mode="r")
