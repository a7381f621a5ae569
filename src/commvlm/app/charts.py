"""The report's charts, as SVG that stands inside an HTML page and needs nothing from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
"""A line's pattern tells runs apart where its colour (Okabe and Ito's) does not."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "commvlm",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
SMOOTHED = 5
"""Logging steps of the running median that is drawn over the raw losses."""

Log = Sequence[Mapping[str, Any]]


def loss_chart(logs: Mapping[str, Log]) -> str:
    """Training loss by step, one panel a stage, one line a run. logs: a run's label -> the rows of its log.jsonl."""
    stages = list(dict.fromkeys(row["stage"] for log in logs.values() for row in log))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 2.6 * len(stages) + 0.5), layout="constrained")
        panels = figure.subplots(len(stages), squeeze=False)[:, 0]
        for panel, stage in zip(panels, stages, strict=True):
            for k, (label, log) in enumerate(logs.items()):
                rows = [row for row in log if row["stage"] == stage]
                steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
                smooth = running_median(losses, SMOOTHED if len(losses) >= 4 * SMOOTHED else 1)
                color, line = COLORS[k % len(COLORS)], LINES[k % len(LINES)]
                panel.plot(steps, losses, color=color, alpha=0.2, linewidth=1)
                panel.plot(steps, smooth, color=color, linestyle=line, linewidth=2, label=label)
            panel.set_title(f"stage {stage}", loc="left", fontsize=11, fontweight="bold")
            panel.set_ylabel("loss per token")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        panels[-1].set_xlabel("step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=3.2)
    return svg(figure, "Training loss by step, one line for each run, one panel for each stage")


def running_median(values: Sequence[float], width: int) -> list[float]:
    """Each value's median with its neighbours, `width` of them in all; fewer at the ends."""
    half = width // 2
    return [float(np.median(values[max(0, k - half) : k + half + 1])) for k in range(len(values))]


def layer_chart(weights: Mapping[str, Mapping[str, float]]) -> str:
    """Learned layer weights, one panel an encoder, with the uniform weight they started from as a dashed line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 2.4 * len(weights)), layout="constrained")
        panels = figure.subplots(len(weights), squeeze=False)[:, 0]
        for k, (panel, (name, layers)) in enumerate(zip(panels, weights.items(), strict=True)):
            numbers = sorted(map(int, layers))
            heights = [layers[str(number)] for number in numbers]
            uniform = 1 / len(numbers)
            top = 1.35 * max(*heights, uniform)
            panel.bar(numbers, heights, color=COLORS[k % len(COLORS)], width=0.7)
            panel.axhline(uniform, color="black", linestyle="--", linewidth=1.2)
            for number, height in zip(numbers, heights, strict=True):
                panel.text(number, height + 0.06 * top, f"{height:.3f}", ha="center", va="bottom", fontsize=9)
            panel.set_title(f"{name} (dashed: uniform, {uniform:.3f})", loc="left", fontsize=11)
            panel.set_ylim(0, top)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            panel.grid(visible=False, axis="x")
            panel.set_ylabel("weight")
        panels[-1].set_xlabel("layer (block output, counted from 1)")
    return svg(figure, "Weight of each layer, by encoder, beside the uniform weight")


def svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element: no prolog, no metadata, no fixed size, nothing that names another place."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
