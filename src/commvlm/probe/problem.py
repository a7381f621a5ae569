"""What frozen features are asked: images with objects that have words and boxes, and the same on a grid of patches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.example import Box
from ..data.geometry import GEOMETRIES, View

Grid = tuple[int, int]
OWNED = 0.25
"""Share of a patch that an object must cover to own it."""


@dataclass(frozen=True)
class Thing:
    """box: pixels of the original image. words: what names it, of the problem's vocabulary. asked: the words by which it is
    asked for, one tuple for each question."""

    box: Box
    words: tuple[str, ...]
    asked: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """size: width, height in pixels. open: the image, RGB. identity: what tells it from others. seen: words that are true of
    something in it, asked about or not."""

    identity: str
    size: tuple[int, int]
    open: Callable[[], Image.Image]
    things: tuple[Thing, ...]
    seen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """name: of the data. words: the vocabulary. categories: how many of the words, the first ones, are kinds, of which an
    object has exactly one; there may be none. train, test: pictures that heads are fitted on, and asked about."""

    name: str
    words: tuple[str, ...]
    categories: int
    train: tuple[Picture, ...]
    test: tuple[Picture, ...]
    geometry: str = "pad-square"

    def __post_init__(self) -> None:
        for split, pictures in (("train", self.train), ("test", self.test)):
            asked = any(thing.asked for picture in pictures for thing in picture.things)
            if len(pictures) < 2 or not asked:
                raise ValueError(
                    f"{self.name}: has {len(pictures)} {split} images; a probe needs some with objects in both, and "
                    "questions about them in words that are known"
                )
        both = {p.identity for p in self.train} & {p.identity for p in self.test}
        if both:
            raise ValueError(f"{self.name}: image {min(both)} is in both train and test; give other files")

    def fingerprint(self) -> str:
        """A hash of what is asked of which images."""
        digest = hashlib.sha256(repr((self.words, self.categories, self.geometry)).encode())
        for pictures in (self.train, self.test):
            for picture in pictures:
                more = (picture.seen,) if picture.seen else ()
                digest.update(repr((picture.identity, picture.size, picture.things, *more)).encode())
            digest.update(b"|")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Truth:
    """One split on a grid of N patches, row by row.

    owner (n, N): the place among `words` of the object that covers most of a patch, -1 for none. image (objects,): each
    object's image. words (objects, W): 0 or 1. boxes (objects, 4): corners as shares of what the encoder is shown.
    queries (questions, 2): object, and row of `asked` (rows, W). seen (n, W): what is true of something in an image, asked
    about or not.
    """

    views: list[View]
    owner: Tensor
    image: Tensor
    words: Tensor
    boxes: Tensor
    pixels: list[Box]
    queries: Tensor
    asked: Tensor
    seen: Tensor

    @property
    def present(self) -> Tensor:
        """(n, W): whether anything in an image has the word."""
        return self.seen.index_add(0, self.image, self.words).clamp_max(1)


def truth_of(words: Sequence[str], pictures: Sequence[Picture], grid: Grid, *, geometry: str = "pad-square") -> Truth:
    """A split's truth on a grid of (rows, columns) patches. words: the vocabulary. geometry: what is shown of an image."""
    places = {word: k for k, word in enumerate(words)}
    views = [GEOMETRIES[geometry](*picture.size) for picture in pictures]
    owner = torch.full((len(pictures), grid[0] * grid[1]), -1, dtype=torch.long)
    image: list[int] = []
    named: list[Tensor] = []
    boxes: list[Box] = []
    queries: list[tuple[int, int]] = []
    asked: list[Tensor] = []
    for n, (picture, view) in enumerate(zip(pictures, views, strict=True)):
        shown = [view.forward(thing.box) for thing in picture.things]
        owner[n] = _owners(shown, grid, first=len(boxes))
        for thing in picture.things:
            queries += [(len(named), len(asked) + k) for k in range(len(thing.asked))]
            asked += [_row(places, said) for said in thing.asked]
            named.append(_row(places, thing.words))
            image.append(n)
        boxes += shown
    return Truth(
        views, owner, torch.tensor(image), torch.stack(named), torch.tensor(boxes, dtype=torch.float32),
        [thing.box for picture in pictures for thing in picture.things], torch.tensor(queries), torch.stack(asked),
        torch.stack([_row(places, picture.seen) for picture in pictures]),
    )  # fmt: skip


def _row(places: dict[str, int], words: Sequence[str]) -> Tensor:
    row = torch.zeros(len(places))
    row[[places[word] for word in words if word in places]] = 1
    return row


def _owners(boxes: Sequence[Box], grid: Grid, *, first: int) -> Tensor:
    """(N,): who owns each patch. An object that owns none, being small, gets the patch of its centre."""
    rows, columns = grid
    owner = np.full((rows, columns), -1)
    best = np.full((rows, columns), OWNED)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        cover = _covered(y1 * rows, y2 * rows, rows)[:, None] * _covered(x1 * columns, x2 * columns, columns)
        owner = np.where(cover > best, first + k, owner)
        best = np.maximum(best, cover)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        if not (owner == first + k).any():
            row, column = min(int((y1 + y2) / 2 * rows), rows - 1), min(int((x1 + x2) / 2 * columns), columns - 1)
            owner[row, column] = first + k
    return torch.from_numpy(owner.reshape(-1))


def _covered(start: float, end: float, count: int) -> np.ndarray:
    """(count,): which share of each unit interval from 0 on lies between start and end."""
    units = np.arange(count)
    return np.clip(np.minimum(end, units + 1) - np.maximum(start, units), 0, 1)


def patch_centers(grid: Grid) -> Tensor:
    """(N, 4): x, y, x, y of every patch's centre, row by row, as shares of what the encoder is shown."""
    rows, columns = torch.meshgrid(
        (torch.arange(grid[0]) + 0.5) / grid[0], (torch.arange(grid[1]) + 0.5) / grid[1], indexing="ij"
    )
    return torch.stack([columns.reshape(-1), rows.reshape(-1)] * 2, dim=1)
