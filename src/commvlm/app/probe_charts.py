"""Layer curves as SVG: one line an encoder, its band, its random twin, and the control that sees only positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..probe.curves import Point, Probe
from ..probe.tasks import TITLES
from .charts import COLORS, LINES, STYLE, svg

MORE = (*COLORS, "#CC79A7", "#56B4E9", "#E69F00")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def curves_chart(probe: Probe, head: str, metric: str) -> str:
    """One metric against the layer, in percent: bands are 95 percent intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        panel = figure.subplots()
        deepest = 1
        for k, encoder in enumerate(probe.encoders()):
            curve, twin = probe.curve(encoder, head, metric), probe.twin(encoder)
            if not curve:
                continue
            look = {"color": MORE[k % len(MORE)], "marker": MARKS[k % len(MARKS)]}
            deepest = max(deepest, *curve)
            _line(panel, curve, linestyle=LINES[k % len(LINES)], label=encoder, **look)
            if twin is not None:
                _faint(panel, probe.curve(twin, head, metric), label=f"{encoder}, random twin", **look)
        for place, value in _positions(probe, head, metric).items():
            panel.axhline(value, color="#777777", linestyle=(0, (1, 2)), linewidth=1.4, label=place)
        panel.set_xlabel("layer (block output, counted from 1)")
        panel.set_ylabel("percent")
        panel.set_title(f"{TITLES[metric]}, {head} head", loc="left", fontsize=11, fontweight="bold")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        panel.set_xlim(0.7, deepest + 0.3)
        handles = panel.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2, handlelength=3, fontsize=9)
    return svg(figure, f"{TITLES[metric]} by layer, {head} head, one line for each encoder, with controls")


def _line(panel: Any, curve: Mapping[int, Point], **look: Any) -> None:
    """A curve and its band."""
    found = {layer: point.interval for layer, point in curve.items()}
    low, high = ([100 * getattr(i, end) for i in found.values()] for end in ("low", "high"))
    panel.fill_between(list(found), low, high, color=look["color"], alpha=0.15, linewidth=0)
    panel.plot(list(found), [100 * i.value for i in found.values()], markersize=5, linewidth=2, **look)


def _faint(panel: Any, curve: Mapping[int, Point], **look: Any) -> None:
    """A twin's curve: thin, dotted, its marks empty."""
    values = [100 * point.interval.value for point in curve.values()]
    panel.plot(
        list(curve), values, linewidth=1, alpha=0.7, linestyle=":", markersize=3, markerfacecolor="white", **look
    )


def _positions(probe: Probe, head: str, metric: str) -> dict[str, float]:
    """The control's score on each grid, in percent."""
    found = {}
    for encoder in probe.encoders():
        point = probe.control(encoder, head, metric)
        if point is not None:
            grid = probe.position(encoder).removeprefix("position-")
            found[f"positions only, {grid}"] = 100 * point.interval.value
    return found
