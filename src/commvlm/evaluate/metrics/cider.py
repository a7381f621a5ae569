"""CIDEr-D as https://github.com/tylin/coco-caption computes it (there called CIDEr), in NumPy, on tokenised text.

CIDEr (Vedantam et al. 2015) with the D variant's clipping and Gaussian length penalty. The figure belongs to the
evaluated set: document frequencies are counted over its images, so a subset scores differently, and a set of one image
scores 0. Two oddities are kept: the length in the penalty is the number of bigrams, and a sentence of fewer than four
words cannot reach 10, having no 4-grams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4
SIGMA = 6.0
SCALE = 10.0


@dataclass(frozen=True)
class Cider:
    """corpus: the mean over images, 0 to 10 (papers print it times 100). per_image: (images,)."""

    corpus: float
    per_image: np.ndarray


@dataclass(frozen=True)
class _Grams:
    """n-grams of one order as columns: the sentence they stand in, their number in the vocabulary, how often."""

    sentence: np.ndarray
    gram: np.ndarray
    count: np.ndarray


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Cider:
    """One tokenised hypothesis (words parted by spaces) and the tokenised references of each image -> CIDEr-D.

    Raises ValueError when the numbers differ, when there is no image, or when an image has no reference.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"CIDEr needs one hypothesis per image, got {len(hypotheses)} for {len(references)} images")
    if not references:
        raise ValueError("CIDEr has nothing to score: no images were given")
    bare = next((k for k, sentences in enumerate(references) if not sentences), None)
    if bare is not None:
        raise ValueError(f"CIDEr needs at least one reference per image, image {bare + 1} has none")
    said = [sentence.split() for sentence in hypotheses]
    true = [sentence.split() for sentences in references for sentence in sentences]
    image = np.repeat(np.arange(len(references)), [len(sentences) for sentences in references])
    gap = _bigrams(said)[image] - _bigrams(true)
    similarity = np.zeros(len(true))
    for order in range(1, ORDERS + 1):
        similarity += _cosine(said, true, image, order)
    similarity *= np.exp(-(gap**2) / (2 * SIGMA**2)) / ORDERS
    per_image = SCALE * np.bincount(image, weights=similarity) / np.bincount(image)
    return Cider(corpus=float(per_image.mean()), per_image=per_image)


def _bigrams(sentences: list[list[str]]) -> np.ndarray:
    return np.array([max(0, len(words) - 1) for words in sentences], dtype=np.float64)


def _cosine(said: list[list[str]], true: list[list[str]], image: np.ndarray, order: int) -> np.ndarray:
    """Clipped cosine of every reference with its image's hypothesis, n-grams of one order -> (references,)."""
    numbers: dict[tuple[str, ...], int] = {}
    hyp, ref = _count(said, order, numbers), _count(true, order, numbers)
    size = max(1, len(numbers))
    images = len(said)
    seen = np.unique(image[ref.sentence] * size + ref.gram) % size
    idf = np.log(images) - np.log(np.maximum(1.0, np.bincount(seen, minlength=size)))
    hyp_weight, ref_weight = hyp.count * idf[hyp.gram], ref.count * idf[ref.gram]
    hyp_norm = np.sqrt(np.bincount(hyp.sentence, weights=hyp_weight**2, minlength=images))[image]
    ref_norm = np.sqrt(np.bincount(ref.sentence, weights=ref_weight**2, minlength=len(true)))
    clipped = np.minimum(_look_up(hyp, hyp_weight, image[ref.sentence] * size + ref.gram, size), ref_weight)
    dot = np.bincount(ref.sentence, weights=clipped * ref_weight, minlength=len(true))
    norm = hyp_norm * ref_norm
    return np.divide(dot, norm, out=np.zeros(len(true)), where=norm > 0)


def _count(sentences: list[list[str]], order: int, numbers: dict[tuple[str, ...], int]) -> _Grams:
    """The n-grams of every sentence; ones not met before get the next number."""
    columns: list[tuple[int, int, int]] = []
    for k, words in enumerate(sentences):
        grams = Counter(zip(*(words[start:] for start in range(order)), strict=False))
        columns.extend((k, numbers.setdefault(gram, len(numbers)), count) for gram, count in grams.items())
    table = np.array(columns, dtype=np.int64).reshape(-1, 3)
    return _Grams(sentence=table[:, 0], gram=table[:, 1], count=table[:, 2])


def _look_up(hyp: _Grams, weight: np.ndarray, wanted: np.ndarray, size: int) -> np.ndarray:
    """The hypothesis' weight of each wanted (image, n-gram) key, 0 where it lacks that n-gram."""
    if not len(weight):
        return np.zeros(len(wanted))
    keys = hyp.sentence * size + hyp.gram
    order = np.argsort(keys)
    at = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    found = order[at]
    return np.where(keys[found] == wanted, weight[found], 0.0)
