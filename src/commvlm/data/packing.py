"""Encoded dialogues -> the tensors of a batch: padded rows, or several dialogues packed behind one shared image.

Packing: the dialogues about one image begin alike (system text, image). A packed row holds that prefix once, then each
dialogue's own rest, its branch:

    row             prefix | branch 1 | branch 2 | ... | padding
    position_ids    0..p-1 | p..      | p..      |     | 0
    may look at     prefix, causally; a branch: the prefix and itself, causally; padding: itself

so every token sees what it would see in a row of its own, and the loss is the same, at one image's cost.

Layout "mask" makes each group a row, and says who may look at whom in a (b, 1, n, n) mask, which any attention takes. Layout
"joined" puts all groups behind each other into one row without any padding, and says their lengths only (`segments`), for
attention that skips what is masked anyway (`model/attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .dialogue import IGNORED, Encoded
from .example import IMAGE, Example

Batch = dict[str, Any]
"""Tensors by name; in layout "joined" also `segments`, [image][length of the prefix, lengths of the branches...]."""


@dataclass(frozen=True)
class Packed:
    """One packed row. branch (n,): 0 for the shared prefix, 1, 2, ... for the branches."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    branch: np.ndarray


def padded_rows(rows: Sequence[Encoded], *, pad: int) -> Batch:
    """Rows padded on the right, with a 2D mask."""
    size = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = np.full(size, pad, dtype=np.int64), np.full(size, IGNORED, dtype=np.int64)
    mask = np.zeros(size, dtype=np.int64)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length], labels[place, :length], mask[place, :length] = row.ids, row.labels, 1
    positions = np.broadcast_to(np.arange(size[1]), size) * mask
    return _tensors(ids, labels, mask, positions)


def packed_rows(rows: Sequence[Packed], *, pad: int) -> Batch:
    """Rows padded on the right, with a 4D mask."""
    size = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = np.full(size, pad, dtype=np.int64), np.full(size, IGNORED, dtype=np.int64)
    positions, branch = np.zeros(size, dtype=np.int64), np.full(size, -1, dtype=np.int16)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length], labels[place, :length] = row.ids, row.labels
        positions[place, :length], branch[place, :length] = row.positions, row.branch
    return _tensors(ids, labels, _branch_mask(branch)[:, None], positions)


def _tensors(ids: np.ndarray, labels: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> Batch:
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def joined_row(rows: Sequence[Packed]) -> Batch:
    """All rows in one (1, n), without padding, and the lengths of what stands in it."""
    arrays = {
        "input_ids": np.concatenate([row.ids for row in rows]),
        "labels": np.concatenate([row.labels for row in rows]),
        "position_ids": np.concatenate([row.positions for row in rows]),
    }
    tensors = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
    return tensors | {"segments": [np.bincount(row.branch).tolist() for row in rows]}


def _branch_mask(branch: np.ndarray) -> np.ndarray:
    """branch (b, n), -1 for padding -> (b, n, n) bool, True where the row's token may look at the column's.

    A token sees itself and what stands before it in the prefix or in its own branch. Padding sees itself alone, which
    keeps its softmax finite.
    """
    length = branch.shape[1]
    asks, seen = branch[:, :, None], branch[:, None, :]
    mask = (seen == asks) | (seen == 0)
    mask &= asks >= 0
    mask &= np.tri(length, dtype=bool)
    places = np.arange(length)
    mask[:, places, places] = True
    return mask


def pack(rows: Sequence[tuple[Example, Encoded]], *, image_id: int | None) -> Packed:
    """Dialogues about one image -> their shared prefix once, then each one's rest."""
    encoded = [row for _, row in rows]
    length = _shared(encoded)
    first = encoded[0]
    if image_id is not None and (first.ids[length:] == image_id).any():
        names = ", ".join(example.id for example, _ in rows)
        raise ValueError(f"examples {names}: differ before their image, so they cannot share it; put {IMAGE} in front")
    rests = [len(row.ids) - length for row in encoded]
    return Packed(
        ids=np.concatenate([first.ids[:length], *(row.ids[length:] for row in encoded)]),
        labels=np.concatenate([first.labels[:length], *(row.labels[length:] for row in encoded)]),
        positions=np.concatenate([np.arange(length), *(length + np.arange(rest) for rest in rests)]),
        branch=np.repeat(np.arange(len(encoded) + 1, dtype=np.int16), [length, *rests]),
    )


def _shared(rows: Sequence[Encoded]) -> int:
    """Length of the longest common prefix that leaves every branch a first token without supervision.

    That first token would be predicted from the last token of the branch before it, so it must not be supervised.
    """
    first = rows[0].ids
    length = len(first)
    for row in rows:
        supervised = int(np.argmax(row.labels != IGNORED))
        length = min(length, len(row.ids), supervised - 1)
        differs = np.flatnonzero(row.ids[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return max(length, 0)
