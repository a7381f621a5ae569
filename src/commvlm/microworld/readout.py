"""What frozen patch features say of a scene: presence of each category (linear), and where a named object is (dense MLP).

Both are read from features computed once; a random-initialised twin of the encoder is read the same way, which is what an
encoder must beat before it may be called trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.boxes import box_iou
from ..model.encoders import read_layers
from .pretrain.symbols import GRID, coverage
from .pretrain.vit import normalised
from .scene import COLORS, DIFFICULTIES, SIDE, Scene, render, sample_scene


@dataclass(frozen=True)
class Truth:
    """names: the C categories. present (scenes, C): 0 or 1. Per patch (scenes, 64): category and colour of the object
    that covers most of it (C and 8: none), and that object's box (scenes, 64, 4) in units of the image."""

    scenes: list[Scene]
    names: tuple[str, ...]
    present: Tensor
    category: Tensor
    color: Tensor
    box: Tensor


@dataclass(frozen=True)
class Reading:
    """presence: mean AUC over categories. rec: share of named objects whose box is found with IoU >= 0.5."""

    presence: float
    rec: float


def probe_scenes(split: str, count: int, difficulty: str) -> tuple[Truth, Tensor]:
    """`count` scenes of a split with their truth, and their pixels uint8 (count, 64, 64, 3)."""
    names = {c: i for i, c in enumerate(DIFFICULTIES[difficulty].categories)}
    colors = {c: i for i, c in enumerate(COLORS)}
    scenes = [sample_scene(split, i, difficulty) for i in range(count)]
    present = torch.zeros(count, len(names))
    category = torch.full((count, GRID**2), len(names))
    color = torch.full((count, GRID**2), len(colors))
    box = torch.zeros(count, GRID**2, 4)
    for i, scene in enumerate(scenes):
        cover = torch.from_numpy(coverage(scene))
        share, owner = cover.max(0)
        inside = share > 0.25
        kinds = torch.tensor([names[t.category] for t in scene.things])
        present[i, kinds] = 1.0
        category[i, inside] = kinds[owner][inside]
        color[i, inside] = torch.tensor([colors[t.color] for t in scene.things])[owner][inside]
        box[i] = torch.tensor([t.box for t in scene.things], dtype=torch.float32)[owner] / SIDE
    pixels = torch.from_numpy(np.stack([render(scene, difficulty) for scene in scenes]))
    return Truth(scenes, tuple(names), present, category, color, box), pixels


def features(encoder: PreTrainedModel, pixels: Tensor, *, family: str, layers: Sequence[int]) -> list[Tensor]:
    """[layer](scenes, 64, d) in float32. pixels: uint8 (scenes, 64, 64, 3)."""
    parts = [read_layers(encoder, normalised(p, family), layers=layers) for p in pixels.split(256)]
    return [torch.cat([part[k] for part in parts]).float() for k in range(len(layers))]


def read_out(train: tuple[Tensor, Truth], test: tuple[Tensor, Truth], *, steps: int = 1200, seed: int = 0) -> Reading:
    """Both heads fitted on one layer's training features (`steps` updates) and scored on its test features.

    Channels are standardised by the training features' mean and deviation.
    """
    torch.manual_seed(seed)
    mean, deviation = train[0].mean((0, 1)), train[0].std((0, 1)) + 1e-6
    train, test = (((x - mean) / deviation, truth) for x, truth in (train, test))
    return Reading(_presence(train, test, steps // 2), _rec(train, test, steps))


def _presence(train: tuple[Tensor, Truth], test: tuple[Tensor, Truth], steps: int) -> float:
    """A linear head on the mean patch token; the mean over categories of the area under the ROC curve."""
    x, y = train[0].mean(1), train[1].present
    head = nn.Linear(x.shape[1], y.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-3)
    for step in range(steps):
        rows = torch.randint(len(x), (512,))
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(head(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        scores = head(test[0].mean(1))
    return float(np.mean([auc(scores[:, c].numpy(), test[1].present[:, c].numpy()) for c in range(y.shape[1])]))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive scores above a negative (Mann-Whitney; no ties among continuous scores)."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    positives = labels > 0.5
    n, m = positives.sum(), (~positives).sum()
    return float((ranks[positives].sum() - n * (n + 1) / 2) / (n * m))


def _rec(train: tuple[Tensor, Truth], test: tuple[Tensor, Truth], steps: int) -> float:
    """An MLP per patch says category, colour and the box's edges from the patch's centre; the patch that most looks like
    the named object gives the box."""
    x, truth = train
    kinds, colors = truth.present.shape[1] + 1, len(COLORS) + 1
    head = nn.Sequential(nn.Linear(x.shape[-1], 256), nn.GELU(), nn.Linear(256, kinds + colors + 4))
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=1e-2)
    centers = patch_centers()
    flat = x.reshape(-1, x.shape[-1])
    category, color = truth.category.reshape(-1), truth.color.reshape(-1)
    reach = (truth.box - centers).reshape(-1, 4)
    for step in range(steps):
        rows = torch.randint(len(flat), (1024,))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        out = head(flat[rows])
        inside = category[rows] < kinds - 1
        loss = F.cross_entropy(out[:, :kinds], category[rows]) + F.cross_entropy(out[:, kinds:-4], color[rows])
        (loss + 8 * F.l1_loss(out[inside, -4:], reach[rows][inside])).backward()
        optimizer.step()
    with torch.no_grad():
        out = head(test[0])
    return _rec_score(out, test[1], kinds, centers)


def _rec_score(out: Tensor, truth: Truth, kinds: int, centers: Tensor) -> float:
    names = {c: i for i, c in enumerate(COLORS)}
    category = out[..., :kinds].log_softmax(-1)
    color = out[..., kinds:-4].log_softmax(-1)
    boxes = out[..., -4:] + centers
    found, true = [], []
    for i, scene in enumerate(truth.scenes):
        for thing in scene.things:
            here = truth.names.index(thing.category)
            patch = (category[i, :, here] + color[i, :, names[thing.color]]).argmax()
            found.append((boxes[i, patch] * SIDE).tolist())
            true.append(thing.box)
    return float(np.mean(box_iou(found, true) >= 0.5))


def patch_centers() -> Tensor:
    """(64, 4): x, y, x, y of every patch's centre, row-major, in units of the image."""
    line = (torch.arange(GRID) + 0.5) / GRID
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([columns.reshape(-1), rows.reshape(-1)] * 2, dim=1)
