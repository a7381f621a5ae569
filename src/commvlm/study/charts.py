"""The study's charts as SVG inside the page: curves over layers with bands, rows as dots with whiskers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..app.charts import LINES, STYLE, svg
from .inside import QUANTITIES, Inside
from .statistics import Estimate
from .tables import titled

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMOOTHED = 8
"""Logged losses that a learning curve's point is the mean of."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def curves(panels: Mapping[str, Mapping[str, Mapping[int, Estimate]]]) -> str:
    """Task -> encoder -> layer -> estimate: one panel a task, one line an encoder, bands of 95 %."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 2.7 * len(panels) + 0.5), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for panel, (task, lines) in zip(axes, panels.items(), strict=True):
            for k, (name, points) in enumerate(lines.items()):
                layers = sorted(points)
                color = COLORS[k % len(COLORS)]
                panel.fill_between(
                    layers, [points[n].low for n in layers], [points[n].high for n in layers], color=color, alpha=0.15, lw=0
                )  # fmt: skip
                panel.plot(
                    layers, [points[n].mean for n in layers], color=color, linestyle=LINES[k % len(LINES)],
                    marker=MARKERS[k % len(MARKERS)], markersize=5, linewidth=2, label=name,
                )  # fmt: skip
            panel.set_title(titled(task), loc="left", fontsize=11, fontweight="bold")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[-1].set_xlabel("layer (block output, counted from 1)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, handlelength=3.2)
    return svg(figure, "Score by layer, one line for each encoder, one panel for each task")


def dots(names: Sequence[str], panels: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Task -> row -> estimate: one panel a task, side by side, rows from the top, whiskers of 95 %."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.4 * len(panels), 0.32 * len(names) + 1.0), layout="constrained")
        axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for k, (panel, (task, found)) in enumerate(zip(axes, panels.items(), strict=True)):
            for place, name in enumerate(names):
                if name in found:
                    one = found[name]
                    panel.plot([one.low, one.high], [place, place], color=COLORS[k % len(COLORS)], linewidth=2)
                    panel.plot(one.mean, place, marker=MARKERS[k % len(MARKERS)], color=COLORS[k % len(COLORS)])
            panel.set_title(titled(task), fontsize=10)
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.set_yticks(range(len(names)), names, fontsize=9)
            panel.grid(visible=False, axis="y")
            panel.tick_params(axis="y", length=0)
    return svg(figure, "Score of each row with its 95 percent interval, one panel for each task")


def learning(rows: Mapping[str, Sequence[Sequence[tuple[str, int, float]]]]) -> str:
    """Row -> per seed its (stage, step within it, loss in nats a token): a line for each seed, stages after each other;
    a point is the mean of `SMOOTHED` logged losses."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4.2), layout="constrained")
        panel = figure.subplots()
        for k, (name, seeds) in enumerate(rows.items()):
            for n, losses in enumerate(seeds):
                steps, values, ends = joined(losses)
                kernel = np.ones(min(SMOOTHED, len(values))) / min(SMOOTHED, len(values))
                smooth = np.convolve(values, kernel, mode="valid")
                panel.plot(
                    steps[len(kernel) - 1 :], smooth, color=COLORS[k % len(COLORS)], linestyle=LINES[k % len(LINES)],
                    linewidth=1.4, alpha=0.85, label=name if n == 0 else None,
                )  # fmt: skip
        for end in ends[:-1]:
            panel.axvline(end, color="#888888", linewidth=1)
        panel.set_ylabel("training loss")
        panel.set_xlabel("update (a line for each seed; upright: the next stage's mixture)")
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=3.2)
    return svg(figure, "Training loss of each row by update, a line for each seed")


def joined(losses: Sequence[tuple[str, int, float]]) -> tuple[list[int], list[float], list[int]]:
    """Updates counted through all stages, their losses, and the update at which each stage ends."""
    steps, ends, last = [], [], 0
    for k, (stage, step, _) in enumerate(losses):
        steps.append(last + step)
        if k + 1 == len(losses) or losses[k + 1][0] != stage:
            last = steps[-1]
            ends.append(last)
    return steps, [loss for _, _, loss in losses], ends


def alignments(found: Mapping[str, Inside]) -> str:
    """Row -> what its alignment does inside, by linear layer, the mean over seeds: one panel a quantity."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 7.2), layout="constrained")
        for panel, (quantity, title) in zip(figure.subplots(3), QUANTITIES.items(), strict=True):
            for k, (name, branches) in enumerate(found.items()):
                ends = next(iter(branches.values()))
                for when, line, label in (("start", ":", None), ("end", "-", name)):
                    values = np.mean(ends[when][quantity], axis=0)
                    panel.plot(
                        range(1, len(values) + 1), values, linestyle=line, color=COLORS[k % len(COLORS)],
                        marker=MARKERS[k % len(MARKERS)], markersize=4, label=label,
                    )  # fmt: skip
            panel.set_yscale("log")
            panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.set_xlabel("linear layer, mean over seeds (dotted: before training, solid: after)")
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return svg(figure, "Gradients and activations in each linear layer of the alignment, before and after training")
