"""The report's charts, one of each experiment, from what is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..app.charts import layer_chart
from ..model.storage import write_text
from . import charts
from .controls import BLIND, RANDOM_TWIN
from .experiments import Experiment, table_1
from .inside import alignments, layer_weights
from .results import Results
from .rows import Row
from .runs import Places
from .settings import Scale


def chart_of(name: str, experiment: Experiment, rows: Sequence[Row], tasks: Sequence[str], results: Results) -> str:
    """An experiment's chart as SVG; nothing where nothing of it is done."""
    if name == "weights":
        return _weights(rows, results)
    if name == "collapse":
        inside = alignments(rows, results)
        return charts.alignments(inside) if inside else ""
    found = {task: results.estimates[task] for task in tasks}
    if not any(row.name in found[task] for row in rows for task in tasks):
        return ""
    if experiment.over == "layer":
        return charts.curves({task: _lines(rows, found[task]) for task in tasks})
    return charts.dots([row.name for row in rows], found)


def _lines(rows: Sequence[Row], estimates: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    lines: dict[str, dict[int, Any]] = {}
    for row in rows:
        if row.name in estimates:
            lines.setdefault(str(row.at["encoder"]), {})[int(row.at["layer"])] = estimates[row.name]
    return lines


def _weights(rows: Sequence[Row], results: Results) -> str:
    """Learned weights, the mean over seeds."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for encoder, layers in layer_weights([row], results).get(row.name, {}).items():
            label = encoder if len(row.model.encoders) == 1 else f"{encoder} in {row.name}"
            found[label] = {layer: sum(values) / len(values) for layer, values in layers.items()}
    return layer_chart(found) if found else ""


def learning_of(places: Places, results: Results, scale: Scale) -> str:
    """How the rows of Table 1 came to see, between a random second encoder and no image."""
    names = [*(row.name for row in table_1(scale)), RANDOM_TWIN, BLIND]
    found = {name: results.of_row(name) for name in names if name in results.rows}
    every = {name: [run["losses"] for run in runs.values() if run["losses"]] for name, runs in found.items()}
    losses = {name: seeds for name, seeds in every.items() if seeds}
    return saved(charts.learning(losses), places.figures / "learning.svg") if losses else ""


def saved(chart: str, path: Path) -> str:
    """The chart, kept as a file of its own, too."""
    if chart:
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'  # a page needs none
        write_text(path, chart if "xmlns:xlink" in chart else chart.replace("<svg ", f"<svg {spaces} ", 1))
    return chart
