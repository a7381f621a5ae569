"""What runs tell of their inside beside scores: weights that merges learned, and what happens inside alignments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .results import Results
from .rows import Row
from .tables import Table

Weights = Mapping[str, Mapping[str, Sequence[float]]]
"""Encoder -> layer (1-based block output) -> its weight with each seed, in the seeds' order."""
Inside = Mapping[str, Mapping[str, Mapping[str, Sequence[Sequence[float]]]]]
"""Encoder -> "start", "end" (before and after training) -> quantity -> with each seed its value in every linear layer."""
QUANTITIES = {
    "gradient_norm": "gradient norm / weight norm",
    "spread": "spread of activations over tokens",
    "rank": "directions taken up (participation ratio)",
}
WHEN = {"start": "before training", "end": "after training"}


def layer_weights(rows: Iterable[Row], results: Results) -> dict[str, Weights]:
    """Row -> weights of its merges, of what is done."""
    found: dict[str, Weights] = {}
    for row in rows:
        runs = [run["layer_weights"] for run in _runs(row, results)]
        kept = {
            encoder: {layer: [run[encoder][layer] for run in runs] for layer in layers}
            for encoder, layers in (runs[0] if runs else {}).items()
        }
        if kept:
            found[row.name] = kept
    return found


def alignments(rows: Iterable[Row], results: Results) -> dict[str, Inside]:
    """Row -> what its runs measured in their alignments, of what is done; rows without an MLP have nothing."""
    found: dict[str, Inside] = {}
    for row in rows:
        runs = [run["alignments"] for run in _runs(row, results) if run["alignments"]]
        kept = {
            encoder: {
                when: {name: [[layer[name] for layer in run[encoder][when]] for run in runs] for name in QUANTITIES}
                for when in WHEN
            }
            for encoder in (runs[0] if runs else {})
        }
        if kept:
            found[row.name] = kept
    return found


def _runs(row: Row, results: Results) -> list[Mapping[str, Any]]:
    """In the seeds' order."""
    return [run for _, run in sorted(results.of_row(row.name).items())] if row.name in results.rows else []


def weights_table(found: Mapping[str, Weights]) -> Table:
    """One line per branch: each layer's weight, the mean over seeds and its least and most."""
    every = [weights for branches in found.values() for weights in branches.values()]
    layers = sorted({layer for weights in every for layer in weights}, key=int)
    lines = [
        [row, encoder, *(_spread(weights[layer]) if layer in weights else "–" for layer in layers)]
        for row, branches in found.items()
        for encoder, weights in branches.items()
    ]
    return Table("Weights that the merges learned, mean over seeds (least to most)", ["row", "encoder", *layers], lines)


def alignments_table(found: Mapping[str, Inside]) -> Table:
    """One line per branch, time and quantity: each linear layer's value, the mean over seeds and its least and most."""
    lines = [
        [row, encoder, WHEN[when], QUANTITIES[name], *(_spread(layer) for layer in zip(*seeds, strict=True))]
        for row, branches in found.items()
        for encoder, times in branches.items()
        for when, quantities in times.items()
        for name, seeds in quantities.items()
    ]
    most = max((len(line) for line in lines), default=4)
    head = ["row", "encoder", "when", "what", *(f"linear layer {n}" for n in range(1, most - 3))]
    title = "Inside the alignments, mean over seeds (least to most)"
    return Table(title, head, [[*line, *["–"] * (most - len(line))] for line in lines])


def _spread(values: Sequence[float]) -> str:
    """ "0.181 (0.175 to 0.188)"; of one value it alone."""
    mean, low, high = (f"{value:.3g}" for value in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def as_facts(merged: Iterable[Row], aligned: Iterable[Row], results: Results) -> dict[str, Any]:
    """Weights of the merged rows and what is inside the alignments of the aligned ones, for JSON, to five digits."""
    return {
        "layer_weights": _rounded(layer_weights(merged, results)),
        "alignments": _rounded(alignments(aligned, results)),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else float(f"{value:.5g}")
