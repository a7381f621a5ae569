"""The questions put to features: where a named object is, whether it is there, what a patch is of, what a region is called.

Every answer is counted by image, so that intervals can be had by drawing images anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.boxes import box_iou
from ..evaluate.metrics.rec import rec_correct
from .heads import RATES, fit, new_head, normalised
from .problem import Truth, patch_centers

BOX_WEIGHT = 8.0


@dataclass(frozen=True)
class Tally:
    """Of one metric: what each of the n test images adds to numerator and denominator; the score is their ratio."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def value(self) -> float:
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class Material:
    """One layer's features, standardised, and their truth: fitted (n, N, d), asked (m, N, d); or several layers', as they
    are, for a learned merge: (n, N, layers, d)."""

    grid: tuple[int, int]
    categories: int
    fitted: Tensor
    asked: Tensor
    train: Truth
    test: Truth


@dataclass(frozen=True)
class Effort:
    """steps: updates of a dense head; the others, which see far fewer rows, take half of them. patches: of one update."""

    steps: int = 400
    patches: int = 1024


def dense(material: Material, *, head: str, seed: int, effort: Effort) -> dict[str, Tally]:
    """REC acc@0.5 and pointing of named objects, and the category of patches.

    A head says of every patch which words name the object that owns it, and where that object's edges are, seen from the
    patch's centre. The patch that most looks like the asked words gives the box, and is pointed at.
    """
    truth, centers = material.train, patch_centers(material.grid)
    flat = material.fitted.flatten(0, 1)
    owner = truth.owner.reshape(-1)
    width = truth.words.shape[1]
    module = new_head(head, flat, width + 4, seed=seed)
    words = torch.cat([truth.words, torch.zeros(1, width)])  # the last row is nobody's: owner -1
    reach = torch.cat([truth.boxes, torch.zeros(1, 4)])

    def loss(rows: Tensor) -> Tensor:
        out, owned = module(flat[rows].float()), owner[rows]
        named = F.binary_cross_entropy_with_logits(out[:, :width], words[owned], reduction="none").sum(1).mean()
        inside = owned >= 0
        edges = reach[owned[inside]] - centers[rows[inside] % len(centers)]
        return named + BOX_WEIGHT * F.l1_loss(out[inside, width:], edges) if inside.any() else named

    fit(module, loss, rows=len(flat), batch=effort.patches, steps=effort.steps, rate=RATES[head], seed=seed)
    with torch.no_grad():
        out = torch.cat([module(part.float()) for part in material.asked.split(64)])
    tallies = _found(out[..., :width], out[..., width:] + centers, material)
    if material.categories:
        tallies["category"] = _categories(out[..., : material.categories], material)
    return tallies


def _found(logits: Tensor, boxes: Tensor, material: Material) -> dict[str, Tally]:
    truth, centers = material.test, patch_centers(material.grid)
    known, unknown = F.logsigmoid(logits), truth.asked
    things, said = truth.queries.T
    images = truth.image[things]
    overlap, pointed = np.zeros(len(things)), np.zeros(len(things))
    for k, (thing, image, row) in enumerate(zip(things.tolist(), images.tolist(), said.tolist(), strict=True)):
        patch = int((known[image] @ unknown[row]).argmax())
        view, true = truth.views[image], truth.pixels[thing]
        overlap[k] = box_iou([view.inverse(_box(boxes[image, patch]))], [true])[0]
        x1, y1, x2, y2 = truth.boxes[thing].tolist()  # of what is shown: padding is in no box
        pointed[k] = x1 <= centers[patch, 0] <= x2 and y1 <= centers[patch, 1] <= y2
    count = len(truth.views)
    return {
        "rec": _by_image(rec_correct(overlap), images, count),
        "pointing": _by_image(pointed, images, count),
    }


def _box(corners: Tensor) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = corners.clamp(0, 1).tolist()
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _by_image(values: np.ndarray, images: Tensor, count: int) -> Tally:
    place = images.numpy()
    return Tally(
        np.bincount(place, weights=values.astype(np.float64), minlength=count),
        np.bincount(place, minlength=count).astype(np.float64),
    )


def _categories(logits: Tensor, material: Material) -> Tally:
    truth = material.test
    image, patch = (truth.owner >= 0).nonzero(as_tuple=True)
    true = truth.words[truth.owner[image, patch]][:, : material.categories].argmax(1)
    return _by_image((logits[image, patch].argmax(1) == true).numpy(), image, len(truth.views))


def presence(material: Material, *, head: str, seed: int, effort: Effort) -> dict[str, Tally]:
    """Whether an object is in the image, from its mean patch token: the area under the ROC curve, mean over categories
    (words, where there are none), and the share of right answers about as many present as absent ones (as POPE asks)."""
    count = material.categories or material.train.words.shape[1]
    labels, asked = material.train.present[:, :count], material.test.present[:, :count]
    x, y = _means(material.fitted), _means(material.asked)
    module = new_head(head, x, count, seed=seed, pooled=True)
    _fit_words(module, x, labels, head=head, seed=seed, effort=effort)
    prior = (labels.sum(0) + 0.5) / (len(labels) + 1)
    with torch.no_grad():
        scores = (module(y) - torch.logit(prior)).numpy()
    return {"auc": _auc(scores, asked.numpy()), "pope": _pope(scores, asked.numpy())}


def _means(features: Tensor) -> Tensor:
    """(n, d) of (n, N, d), or (n, layers, d) of normalised tokens of several layers: the mean over patches."""
    if features.ndim == 3:
        return features.mean(1).float()
    return torch.cat([normalised(part).mean(1) for part in features.split(64)])


def _fit_words(module: nn.Module, x: Tensor, labels: Tensor, *, head: str, seed: int, effort: Effort) -> None:
    def loss(rows: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(module(x[rows]), labels[rows], reduction="none").sum(1).mean()

    fit(module, loss, rows=len(x), batch=min(512, len(x)), steps=effort.steps // 2, rate=RATES[head], seed=seed)


def auc_of(scores: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """(n,) scores and 0/1 labels -> the probability that a positive scores above a negative (a tie counts half), and
    (n,) each row's influence on it: what its weight moves (the placements of DeLong et al., 1988)."""
    order = np.sort(scores[labels < 0.5]), np.sort(scores[labels >= 0.5])
    positives = labels >= 0.5
    below = (np.searchsorted(order[0], scores, "left") + np.searchsorted(order[0], scores, "right")) / (
        2 * len(order[0])
    )
    above = 1 - (np.searchsorted(order[1], scores, "left") + np.searchsorted(order[1], scores, "right")) / (
        2 * len(order[1])
    )
    area = float(below[positives].mean())
    share = np.where(positives, positives.mean(), 1 - positives.mean())
    return area, (np.where(positives, below, above) - area) / share


def _auc(scores: np.ndarray, labels: np.ndarray) -> Tally:
    """Each image's pseudo-value: the mean of these is the area, and drawing images anew moves it as the area would move."""
    columns = [k for k in range(labels.shape[1]) if 0 < labels[:, k].sum() < len(labels)]
    if not columns:
        return Tally(np.zeros(len(labels)), np.zeros(len(labels)))
    found = [auc_of(scores[:, k], labels[:, k]) for k in columns]
    values = np.mean([area + influence for area, influence in found], axis=0)
    return Tally(values, np.ones(len(labels)))


def _pope(scores: np.ndarray, labels: np.ndarray) -> Tally:
    """At most three present categories of every image, and as many absent ones, drawn alike for every encoder."""
    sums, counts = np.zeros(len(labels)), np.zeros(len(labels))
    for k, (row, truth) in enumerate(zip(scores, labels, strict=True)):
        rng = np.random.default_rng([k, 4])
        there, absent = np.flatnonzero(truth >= 0.5), np.flatnonzero(truth < 0.5)
        number = min(3, len(there), len(absent))
        there, absent = rng.permutation(there)[:number], rng.permutation(absent)[:number]
        sums[k] = (row[there] > 0).sum() + (row[absent] <= 0).sum()
        counts[k] = 2 * number
    return Tally(sums, counts)


def region(material: Material, *, head: str, seed: int, effort: Effort) -> dict[str, Tally]:
    """What an object is called, from the mean of the patches that it owns: the share of its words among as many of the
    likeliest ones (R-precision)."""
    x, y = (_regions(f, t) for f, t in ((material.fitted, material.train), (material.asked, material.test)))
    labels, true = material.train.words, material.test.words
    module = new_head(head, x, labels.shape[1], seed=seed, pooled=True)
    _fit_words(module, x, labels, head=head, seed=seed, effort=effort)
    with torch.no_grad():
        ranks = module(y).argsort(1, descending=True).argsort(1)
    number = true.sum(1)
    hits = ((ranks < number[:, None]) & (true > 0.5)).sum(1)
    values = (hits / number.clamp_min(1)).numpy()
    named = number > 0  # of the others nobody says what they are called
    return {"region": _by_image(values[named.numpy()], material.test.image[named], len(material.test.views))}


def _regions(features: Tensor, truth: Truth) -> Tensor:
    """(objects, d), or (objects, layers, d) as `_means`: the mean over the patches that each object owns; 0 where others
    cover it."""
    image, patch = (truth.owner >= 0).nonzero(as_tuple=True)
    owner = truth.owner[image, patch]
    sums = torch.zeros(len(truth.words), *features.shape[2:])
    for places in torch.arange(len(owner)).split(4096):
        tokens = features[image[places], patch[places]]
        sums.index_add_(0, owner[places], tokens.float() if features.ndim == 3 else normalised(tokens))
    number = torch.bincount(owner, minlength=len(truth.words)).clamp_min(1)
    return sums / number.view(-1, *[1] * (sums.ndim - 1))


READINGS: dict[str, tuple[Callable[..., dict[str, Tally]], tuple[str, ...]]] = {
    "dense": (dense, ("rec", "category")),
    "presence": (presence, ("presence",)),
    "region": (region, ("region",)),
}
"""What is fitted, and which tasks it answers."""
TASKS = ("rec", "presence", "category", "region")
METRICS = {"rec": ("rec", "pointing"), "presence": ("auc", "pope"), "category": ("category",), "region": ("region",)}
TITLES = {
    "rec": "REC acc@0.5", "pointing": "pointing", "auc": "presence AUC", "pope": "presence accuracy (POPE-like)",
    "category": "patch category", "region": "region words (R-precision)",
}  # fmt: skip


def read_out(
    material: Material, tasks: Sequence[str], *, head: str, seed: int, effort: Effort | None = None
) -> dict[str, Tally]:
    """Every metric of the asked tasks, of one head and one seed."""
    found: dict[str, Tally] = {}
    for reading, answered in READINGS.values():
        if set(answered) & set(tasks):
            found |= reading(material, head=head, seed=seed, effort=effort or Effort())
    wanted = {metric for task in tasks for metric in METRICS[task]}
    return {metric: tally for metric, tally in found.items() if metric in wanted and tally.counts.sum() > 0}
