"""Scenes of the micro world: layout from a seed, pixels from a layout. Deterministic, with exact boxes.

A scene is a function of (split, index) alone: a Philox generator keyed by both draws it, so train, test and the
encoders' pretraining never share one, whatever the number of scenes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .shapes import COLORS, SHAPES

SIDE = 64
"""Width and height of a scene in pixels."""
SCALE = 4
"""Scenes are drawn this many times larger and averaged down."""
SPLITS = {"pretrain": 1, "train": 2, "val": 3, "test": 4, "probe-train": 5, "probe-test": 6}


@dataclass(frozen=True)
class Difficulty:
    """What makes a world easy or hard for a model of two million parameters.

    sizes: sides of objects in pixels. overlap: the largest share of any object's box that another may cover.
    kindred: the probability that an object comes from the scene's theme (half of the categories), which is what
    makes some absent objects likely (POPE's adversarial negatives).
    """

    categories: tuple[str, ...]
    sizes: tuple[int, ...]
    objects: tuple[int, int]
    overlap: float
    clutter: tuple[int, int]
    kindred: float = 0.75


DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(tuple(SHAPES)[:10], (14, 18, 22, 26), (2, 4), 0.03, (2, 8)),
    "hard": Difficulty(tuple(SHAPES), (10, 14, 18, 24), (2, 5), 0.22, (8, 24)),
}
LARGE = 22
"""An object whose longer side is at least this many pixels is called large."""


@dataclass(frozen=True)
class Thing:
    """One object: category, colour, box in pixels (x1, y1, x2, y2; even integers, exact)."""

    category: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> int:
        x1, y1, x2, y2 = self.box
        return max(x2 - x1, y2 - y1)


@dataclass(frozen=True)
class Scene:
    split: str
    index: int
    things: tuple[Thing, ...]

    @property
    def name(self) -> str:
        return f"micro_{self.split}_{self.index:012d}.png"


def generator(split: str, index: int, stream: int) -> np.random.Generator:
    """The scene's own random numbers. stream 0: layout, 1: pixels, 2: language, higher: free for callers."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid: {', '.join(SPLITS)}")
    return np.random.Generator(np.random.Philox(key=[SPLITS[split] << 32 | stream, index]))


def world_of(difficulty: str) -> Difficulty:
    """The named difficulty; a ValueError that lists the valid names otherwise."""
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"unknown difficulty {difficulty!r}; valid: {', '.join(DIFFICULTIES)}")
    return DIFFICULTIES[difficulty]


def sample_scene(split: str, index: int, difficulty: str | Difficulty = "easy") -> Scene:
    """The layout of scene (split, index): objects drawn from a theme, placed so that none is covered too much."""
    world = world_of(difficulty) if isinstance(difficulty, str) else difficulty
    rng = generator(split, index, 0)
    half = len(world.categories) // 2
    theme = world.categories[:half] if rng.random() < 0.5 else world.categories[half:]
    wanted = int(rng.integers(world.objects[0], world.objects[1] + 1))
    things: list[Thing] = []
    while len(things) < wanted:
        pool = theme if rng.random() < world.kindred else world.categories
        category = pool[int(rng.integers(len(pool)))]
        color = tuple(COLORS)[int(rng.integers(len(COLORS)))]
        if any(t.category == category and t.color == color for t in things):
            continue
        box = _place(rng, world, things)
        if box is None:  # a crowded canvas: start again with the same generator
            things = []
            continue
        things.append(Thing(category, color, box))
    return Scene(split, index, tuple(things))


def _place(rng: np.random.Generator, world: Difficulty, things: list[Thing]) -> tuple[int, int, int, int] | None:
    for _ in range(40):
        side = world.sizes[int(rng.integers(len(world.sizes)))]
        other = max(min(world.sizes), side - 2 * int(rng.integers(0, 3)))
        w, h = (side, other) if rng.random() < 0.5 else (other, side)
        x1 = 2 * int(rng.integers(0, (SIDE - w) // 2 + 1))
        y1 = 2 * int(rng.integers(0, (SIDE - h) // 2 + 1))
        box = (x1, y1, x1 + w, y1 + h)
        if all(covered(box, t.box) <= world.overlap for t in things):
            return box
    return None


def covered(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """The intersection of two boxes as a share of the smaller one."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return w * h / min(areas)


def render(scene: Scene, difficulty: str = "easy") -> np.ndarray:
    """The scene's pixels: uint8 (64, 64, 3)."""
    world = world_of(difficulty)
    rng = generator(scene.split, scene.index, 1)
    canvas = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE))
    draw = ImageDraw.Draw(canvas)
    base = rng.integers(18, 78, size=3)
    draw.rectangle((0, 0, SIDE * SCALE, SIDE * SCALE), fill=_rgb(base))
    palette = list(COLORS.values())
    for _ in range(int(rng.integers(world.clutter[0], world.clutter[1] + 1))):
        color = palette[int(rng.integers(len(palette)))] if rng.random() < 0.5 else rng.integers(40, 160, size=3)
        x, y = rng.integers(0, SIDE * SCALE, size=2)
        dx, dy = rng.integers(-5 * SCALE, 5 * SCALE + 1, size=2)
        if rng.random() < 0.5:
            draw.line((int(x), int(y), int(x + dx), int(y + dy)), fill=_rgb(color), width=SCALE)
        else:
            r = int(rng.integers(SCALE // 2, 2 * SCALE))
            draw.ellipse((int(x - r), int(y - r), int(x + r), int(y + r)), fill=_rgb(color))
    for thing in scene.things:
        draw_thing(draw, thing, np.asarray(COLORS[thing.color]) + rng.integers(-18, 19, size=3))
    pixels = np.asarray(canvas, dtype=np.float32).reshape(SIDE, SCALE, SIDE, SCALE, 3).mean(axis=(1, 3))
    slope = rng.uniform(-14, 14, size=2)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    pixels += (slope[0] * ramp[None, :] + slope[1] * ramp[:, None])[..., None]
    pixels += rng.normal(0, 4, size=pixels.shape).astype(np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, color: np.ndarray) -> None:
    """One object on a canvas SCALE times the scene's size; it touches all four sides of its box."""
    x1, y1, x2, y2 = (v * SCALE for v in thing.box)
    for shade, kind, points in SHAPES[thing.category]:
        fill = _rgb(color * shade)
        placed = [(x1 + u * (x2 - x1 - 1), y1 + v * (y2 - y1 - 1)) for u, v in points]
        if kind == "ellipse":
            draw.ellipse((*placed[0], *placed[1]), fill=fill)
        else:
            draw.polygon(placed, fill=fill)


def _rgb(values: np.ndarray | tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(v, 0, 255)) for v in values)
    return r, g, b
