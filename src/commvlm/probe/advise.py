"""From curves to a recipe: which encoder, which layers, which merge, for which task, on what evidence and at what cost; and
whether probes foretell what trained models score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import yaml

from ..model.cost import visual_flops
from ..model.layers import parse_layers
from ..model.spec import EncoderSpec, vision_config
from .curves import Interval, Point, Probe, spearman
from .tasks import METRICS, TITLES
from .trained import Trained

MERGE_OF = {
    "mean(half)": ("half", "mean"), "mean(all)": ("all", "mean"), "lln-layerscale(all)": ("all", "lln-layerscale"),
}  # fmt: skip
"""A probe's place beside single layers -> a recipe's layers and merge."""


@dataclass(frozen=True)
class Candidate:
    """An encoder and what is read of it, its score by the task's metric, and its cost: billions of FLOPs an image, of the
    encoder as deep as that needs and of the merge."""

    encoder: str
    place: str
    point: Point
    gflops: float

    def setting(self, checkpoint: str, source: Mapping[str, Any]) -> dict[str, Any]:
        """As an entry of a recipe's model.encoders. source: what the probe says of the encoder."""
        layers, merge = MERGE_OF.get(self.place, (None, "mean"))
        return {
            "name": self.encoder,
            "checkpoint": checkpoint,
            "layers": int(self.place) if layers is None else layers,
            "merge": merge,
            **_shown(source),
        }


@dataclass(frozen=True)
class Advice:
    """For one task: chosen, the cheapest of those that cannot be told from the best; best; behind: best minus chosen; twin:
    chosen minus the same place of its random twin (None where it has none)."""

    task: str
    metric: str
    head: str
    chosen: Candidate
    best: Candidate
    behind: Interval
    twin: Interval | None
    candidates: int


def costs(probe: Probe) -> dict[tuple[str, str], float]:
    """(encoder, place) -> GFLOPs of an image, counted on the meta device (`model.cost`)."""
    places = {(name, place) for name, place, *_ in probe.points if name in probe.encoders()}
    found = {}
    for name, place in places:
        source = probe.sources[name]
        found[name, place] = _gflops(source["checkpoint"], place, source.get("image_size"))
    return found


def _shown(source: Mapping[str, Any]) -> dict[str, Any]:
    """The image size and weights that were probed, where a recipe's would be others."""
    usual = {"image_size": None, "weights": "checkpoint"}
    return {name: source[name] for name, value in usual.items() if source.get(name, value) != value}


@lru_cache(maxsize=512)
def _gflops(checkpoint: str, place: str, image_size: int | None) -> float:
    layers, merge = MERGE_OF.get(place, (None, "mean"))
    chosen = int(place) if layers is None else layers
    spec = EncoderSpec("encoder", checkpoint, layers=chosen, merge=merge, image_size=image_size)
    return visual_flops(vision_config([spec], fuse="channel-concat", reduce="none", language_width=1)) / 1e9


def advise(probe: Probe, task: str, *, head: str = "mlp") -> Advice:
    """The advice for one task. Raises ValueError for a task or a head that the probe was not asked."""
    metric = METRICS[task][0] if task in METRICS else ""
    if head not in probe.heads() or metric not in probe.metrics():
        raise ValueError(
            f"{probe.out} was not asked task {task!r} with head {head!r}; it has {', '.join(probe.record['asked']['tasks'])} "
            f"and {', '.join(probe.heads())}"
        )
    price = costs(probe)
    candidates = [
        Candidate(name, place, point, price[name, place])
        for (name, place, kind, of), point in probe.points.items()
        if name in probe.encoders() and kind == head and of == metric
    ]
    best = max(candidates, key=lambda c: c.point.seeds.mean())
    level = [c for c in candidates if best.point.minus(c.point).sure <= 0]
    chosen = min(level, key=lambda c: (c.gflops, -c.point.seeds.mean()))
    twin = probe.points.get((f"{chosen.encoder}-twin", chosen.place, head, metric))
    return Advice(
        task, metric, head, chosen, best, best.point.minus(chosen.point),
        None if twin is None else chosen.point.minus(twin), len(candidates),
    )  # fmt: skip


def recipe_text(
    probe: Probe, advices: Sequence[Advice], *, checkpoints: Mapping[str, str], extends: str, name: str
) -> str:
    """The advice as a recipe's YAML: an encoder for each task; where tasks want other layers of one encoder, LLN-Layerscale
    over all of those. checkpoints: encoder -> its checkpoint, as a recipe says it."""
    settings: dict[str, dict[str, Any]] = {}
    for advice in advices:
        encoder = advice.chosen.encoder
        chosen = advice.chosen.setting(checkpoints[encoder], probe.sources[encoder])
        kept = settings.setdefault(chosen["name"], chosen)
        if kept != chosen:
            depth = probe.sources[chosen["name"]]["depth"]
            layers = sorted({layer for setting in (kept, chosen) for layer in _as_layers(setting["layers"], depth)})
            settings[chosen["name"]] = {**kept, "layers": layers, "merge": "lln-layerscale"}
    lines = [f"# Advised by probes of {probe.record['asked']['data']} (commvlm probe advise)."]
    lines += [f"# {line}" for advice in advices for line in said(advice)]
    content = {"extends": extends, "name": name, "model": {"encoders": list(settings.values())}}
    return "\n".join(lines) + "\n" + yaml.safe_dump(content, sort_keys=False)


def _as_layers(layers: Any, depth: int) -> tuple[int, ...]:
    return (*layers,) if isinstance(layers, list) else parse_layers(layers, depth)


def said(advice: Advice) -> list[str]:
    """The evidence in words, a line each."""
    chosen, best = advice.chosen, advice.best
    lines = [
        f"{advice.task}: {chosen.encoder} {place_name(chosen.place)}, {TITLES[advice.metric]} "
        f"{shown(chosen.point.interval)}, {chosen.gflops:.2f} GFLOPs an image."
    ]
    if chosen != best:
        lines.append(
            f"  The best of {advice.candidates}, {best.encoder} {place_name(best.place)} ({shown(best.point.interval)}, "
            f"{best.gflops:.2f} GFLOPs), cannot be told from it: difference {shown(advice.behind)}."
        )
    if advice.twin is not None:
        verdict = {1: "above", 0: "not to be told from", -1: "below"}[advice.twin.sure]
        lines.append(f"  It is {verdict} its random twin: {shown(advice.twin)}.")
    return lines


def place_name(place: str) -> str:
    """ "layer 3", or the merge's own name."""
    return f"layer {place}" if place.isdigit() else place


def shown(interval: Interval) -> str:
    """ "91.6 [90.8, 92.5]", in percent."""
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation of a probe's scores with trained models' over `pairs` configurations, and its 95 percent
    interval."""

    pairs: int
    interval: Interval


def scores_of(probe: Probe, metric: str, *, head: str = "mlp") -> dict[tuple[str, str], Point]:
    """(encoder, place) -> score."""
    return {(name, place): point for (name, place, h, m), point in probe.points.items() if (h, m) == (head, metric)}


def agreement(points: Mapping[tuple[str, str], Point], trained: Sequence[Trained], *, seed: int = 0) -> Agreement:
    """How well a probe's scores, by (encoder, place), rank what was trained. The interval draws anew the test images and
    seeds of both sides, and which configurations were compared. Raises ValueError for fewer than three that both have."""
    both = [(points[t.encoder, t.place], t) for t in trained if (t.encoder, t.place) in points]
    if len(both) < 3:
        raise ValueError(
            f"probe and trained models share {len(both)} configurations; a rank correlation needs at least 3"
        )
    rng = np.random.default_rng(seed)
    value = spearman([p.seeds.mean() for p, _ in both], [float(np.mean(t.scores)) for _, t in both])
    draws = len(both[0][0].draws)
    foretold = np.stack([point.draws for point, _ in both])
    came = np.stack([rng.choice(t.scores, size=(draws, len(t.scores))).mean(1) for _, t in both])
    came = came + rng.standard_normal(came.shape) * np.array([[t.error] for _, t in both])
    found = []
    for k in range(draws):
        rows = rng.integers(len(both), size=len(both))
        found.append(spearman(foretold[rows, k], came[rows, k]))
    low, high = np.nanquantile(found, (0.025, 0.975))
    return Agreement(len(both), Interval(value, float(low), float(high)))
