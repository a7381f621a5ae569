"""The paper's findings F1 to F4 (arXiv 2310.08825) held against a probe's curves: each claim, what was measured, and what the
interval allows to say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .advise import place_name, shown
from .curves import Interval, Point, Probe, best, highest, layer_shift
from .tasks import TITLES

HEAD = "mlp"
VERDICTS = {1: "holds", -1: "does not hold", 0: "cannot tell"}
NOT_READ = "not read"
FAMILIES = {
    "clip": ("clip", "clip_vision_model"), "dinov2": ("dinov2", "dinov2_with_registers"), "mae": ("vit_mae",),
    "deit": ("deit", "vit"),
}  # fmt: skip
"""Whom the paper's claims are about, and the library's names of their architectures."""
CEILING = 0.99
"""A metric whose best score is above this leaves no room to tell layers apart."""


@dataclass(frozen=True)
class Row:
    """finding: F1 to F4, or "control". measured: in words, percent with 95 percent intervals. verdict: one of `VERDICTS`, or
    `NOT_READ`. about: the trained encoders that it speaks of. metric: by which."""

    finding: str
    claim: str
    measured: str
    verdict: str
    about: tuple[str, ...] = ()
    metric: str = ""


def findings(probe: Probe) -> list[Row]:
    """Every claim that the probe can speak of, and those that it lacks the encoders for.

    A claim about an encoder that is not above its random twin on the claim's metric cannot be told, whatever was measured: it
    would be about the architecture.
    """
    rows = [*_first(probe), *_second(probe), *_third(probe), *_fourth(probe)]
    return [*_controls(probe), *(_qualified(probe, row) for row in rows)]


def encoder_of(probe: Probe, role: str) -> str | None:
    """The encoder that a row of `FAMILIES` is read by: the one that is called so, else the first of its architecture."""
    named = probe.encoders()
    alike = (name for name in named if probe.sources[name].get("family") in FAMILIES[role])
    return role if role in named else next(alike, None)


def _qualified(probe: Probe, row: Row) -> Row:
    weak = [encoder for encoder in row.about if not _above_twin(probe, encoder, row.metric)]
    if row.verdict == NOT_READ or not weak:
        return row
    return replace(row, measured=f"{row.measured}; {' and '.join(weak)} not above its twin", verdict=VERDICTS[0])


def _above_twin(probe: Probe, encoder: str, metric: str) -> bool:
    """Whether the best layer is above the random twin's best; true where no twin was read."""
    gap = _twin_gap(probe, encoder, metric)
    return gap is None or gap.sure > 0


def _twin_gap(probe: Probe, encoder: str, metric: str) -> Interval | None:
    twin = probe.twin(encoder)
    own = probe.curve(encoder, HEAD, metric)
    random = probe.curve(twin, HEAD, metric) if twin is not None else {}
    return highest(own).minus(highest(random)) if own and random else None


def _of(interval: Interval, wanted: int = 1) -> str:
    return VERDICTS[interval.sure * wanted]


def _curves(probe: Probe, encoder: str, head: str = HEAD) -> dict[str, dict[int, Point]]:
    found = {metric: probe.curve(encoder, head, metric) for metric in probe.metrics()}
    return {metric: curve for metric, curve in found.items() if curve}


def _controls(probe: Probe) -> Iterator[Row]:
    """Is each encoder above its random twin? What is said of one that is not, is said of its architecture."""
    for encoder in probe.encoders():
        for metric in ("rec", "auc"):
            gap = _twin_gap(probe, encoder, metric)
            if gap is not None:
                measured = f"best layer minus the twin's best, {TITLES[metric]}: {shown(gap)}"
                yield Row("control", f"{encoder} is above its random twin", measured, _of(gap))


def _first(probe: Probe) -> Iterator[Row]:
    for encoder in probe.encoders():
        curves = _curves(probe, encoder)
        if not {"rec", "auc"} <= curves.keys():
            continue
        shift = layer_shift(curves["rec"], curves["auc"])
        tops = "; ".join(
            f"{TITLES[m]} best at {_best(curve)}" for m, curve in curves.items() if m in ("rec", "auc", "region")
        )
        measured = (
            f"{tops}; presence's best lies {shift.value:+.0f} [{shift.low:+.0f}, {shift.high:+.0f}] layers deeper"
        )
        yield Row(
            "F1",
            f"{encoder}: the best layer for REC is shallower than that for presence",
            measured,
            _of(shift),
            (encoder,),
            "rec",
        )
        yield _last_layer(probe, encoder, curves["rec"], "rec", claim="REC falls towards the last layer", wanted=-1)
        yield _last_layer(
            probe, encoder, curves["auc"], "auc", claim="presence keeps improving to the last layer", wanted=1
        )


def _best(curve: Mapping[int, Point]) -> str:
    top, others = best(dict(curve))
    full = " (near its ceiling)" if curve[top].seeds.mean() > CEILING else ""
    among = "" if others == [top] else f", or {', '.join(str(k) for k in others if k != top)}"
    return f"layer {top}{among}{full}"


def _last_layer(probe: Probe, encoder: str, curve: Mapping[int, Point], metric: str, *, claim: str, wanted: int) -> Row:
    """The encoder's last layer against the best of those before it."""
    *before, last = list(curve)
    depth = probe.sources[encoder]["depth"]
    if last != depth or not before:
        lacks = f"layer {depth}" if last != depth else "another layer"
        return Row("F1", f"{encoder}: {claim}", f"the probe has no {lacks} of {encoder}", NOT_READ)
    gap = curve[last].minus(highest({k: curve[k] for k in before}))
    measured = f"layer {last} minus the best before it, {TITLES[metric]}: {shown(gap)}"
    return Row("F1", f"{encoder}: {claim}", measured, _of(gap, wanted), (encoder,), metric)


def _second(probe: Probe) -> Iterator[Row]:
    claims = {
        "deep": "DINOv2's deep layers, read by an MLP, are above CLIP's best on REC",
        "gain": "DINOv2 gains more than CLIP from a non-linear head (REC)",
        "pope": "DINOv2's best single layer is below CLIP's on presence",
    }
    names = {role: encoder_of(probe, role) for role in ("clip", "dinov2")}
    there = None not in names.values()
    curves = {role: _curves(probe, str(name)) if there else {} for role, name in names.items()}
    plain = {role: probe.curve(str(name), "linear", "rec") if there else {} for role, name in names.items()}
    about = (str(names["dinov2"]),)
    rec, auc = (all(metric in curve for curve in curves.values()) for metric in ("rec", "auc"))
    yield _deep(probe, curves, claims["deep"], about) if rec else _lacks("F2", claims["deep"], "REC", HEAD)
    yield (
        _gain(curves, plain, claims["gain"], about)
        if rec and all(plain.values())
        else _lacks("F2", claims["gain"], "REC", "linear and mlp")
    )
    yield _presence(curves, claims["pope"], about) if auc else _lacks("F2", claims["pope"], "presence", HEAD)


def _lacks(finding: str, claim: str, task: str, heads: str) -> Row:
    return Row(finding, claim, f"the probe has no {task} of clip and dinov2 (heads: {heads})", NOT_READ)


Curves = Mapping[str, Mapping[str, dict[int, Point]]]


def _deep(probe: Probe, curves: Curves, claim: str, about: tuple[str, ...]) -> Row:
    half = probe.sources[about[0]]["depth"] // 2
    deep = {k: p for k, p in curves["dinov2"]["rec"].items() if k > half}
    if not deep:
        return Row("F2", claim, "the probe has none of DINOv2's second half", NOT_READ)
    gap = highest(deep).minus(highest(curves["clip"]["rec"]))
    told = f"best of DINOv2's second half minus CLIP's best: {shown(gap)}"
    return Row("F2", claim, told, _of(gap), about, "rec")


def _gain(curves: Curves, plain: Mapping[str, dict[int, Point]], claim: str, about: tuple[str, ...]) -> Row:
    gains = {name: _difference(highest(curve["rec"]), highest(plain[name])) for name, curve in curves.items()}
    more = gains["dinov2"].minus(gains["clip"])
    told = f"DINOv2 {shown(gains['dinov2'].interval)}, CLIP {shown(gains['clip'].interval)}; difference {shown(more)}"
    return Row("F2", claim, f"MLP minus linear, best layers: {told}", _of(more), about, "rec")


def _presence(curves: Curves, claim: str, about: tuple[str, ...]) -> Row:
    gap = highest(curves["dinov2"]["auc"]).minus(highest(curves["clip"]["auc"]))
    return Row("F2", claim, f"DINOv2 minus CLIP, presence AUC: {shown(gap)}", _of(gap, -1), about, "auc")


def _difference(a: Point, b: Point) -> Point:
    return Point(np.array([a.seeds.mean() - b.seeds.mean()]), a.draws - b.draws)


def _third(probe: Probe) -> Iterator[Row]:
    """What shallow layers do is claimed of CLIP and of DINOv2 alone."""
    claimed = {encoder_of(probe, role): role for role in ("clip", "dinov2")}
    for encoder in probe.encoders():
        for metric in ("rec", "auc"):
            merged, curve = probe.merged(encoder, HEAD, metric), probe.curve(encoder, HEAD, metric)
            if not merged or not curve:
                continue
            gaps = {name: point.minus(highest(curve)) for name, point in merged.items()}
            told = "; ".join(f"{name} {shown(gap)}" for name, gap in gaps.items())
            claim = f"{encoder}: LLN-Layerscale over all layers is above the best single layer ({TITLES[metric]})"
            learned = gaps.get("lln-layerscale(all)")
            verdict = NOT_READ if learned is None else _of(learned)
            yield Row("F3", claim, f"merge minus the best layer: {told}", verdict, (encoder,), metric)
            if {"mean(half)", "mean(all)"} <= merged.keys() and encoder in claimed:
                yield _shallow(encoder, metric, merged, hurts=claimed[encoder] == "dinov2")


def _shallow(encoder: str, metric: str, merged: Mapping[str, Point], *, hurts: bool) -> Row:
    gap = merged["mean(all)"].minus(merged["mean(half)"])
    claim = f"{encoder}: shallow layers {'hurt' if hurts else 'help'} a plain mean ({TITLES[metric]})"
    return Row(
        "F3", claim, f"mean(all) minus mean(half): {shown(gap)}", _of(gap, -1 if hurts else 1), (encoder,), metric
    )


def _fourth(probe: Probe) -> Iterator[Row]:
    claims = {
        "mae": (
            ("rec", "MAE's REC is fair: above its random twin's", 1),
            ("auc", "MAE's presence is weak: below CLIP's", -1),
        ),
        "deit": (
            ("rec", "DeiT is weakest on REC: below CLIP's", -1),
            ("auc", "DeiT's presence is weak: below CLIP's", -1),
        ),
    }
    for role, asked in claims.items():
        encoder = encoder_of(probe, role)
        for metric, claim, wanted in asked:
            twin = None if encoder is None else probe.twin(encoder)
            other = twin if "twin" in claim else encoder_of(probe, "clip")
            own = {} if encoder is None else probe.curve(encoder, HEAD, metric)
            rival = {} if other is None else probe.curve(other, HEAD, metric)
            if encoder is None or not own or not rival:
                lacks = role if not own else f"random twin of {role}" if "twin" in claim else "clip"
                yield Row("F4", claim, f"the probe has no {lacks}", NOT_READ)
                continue
            gap = highest(own).minus(highest(rival))
            measured = f"best layer minus {other}'s best, {TITLES[metric]}: {shown(gap)}"
            about = () if other == twin else (encoder,)
            yield Row("F4", claim, measured, _of(gap, wanted), about, metric)


def as_markdown(probe: Probe) -> str:
    """The findings and the scores as Markdown tables: what docs/findings.md shows."""
    asked, images = probe.record["asked"], probe.record
    lines = [
        f"Data {asked['data']}: {images['train']:,} images fitted on, {images['test']:,} asked about; {asked['seeds']} "
        f"seeds; {asked['effort']['steps']} updates of a head; 95 percent intervals over images and seeds, paired.",
        "",
        "| finding | claim | measured (percent) | verdict |",
        "|---|---|---|---|",
        *(f"| {row.finding} | {row.claim} | {row.measured} | **{row.verdict}** |" for row in findings(probe)),
    ]
    for metric in probe.metrics():
        lines += ["", f"{TITLES[metric]}, {HEAD.upper()} head, percent:", "", *_table(probe, metric)]
    return "\n".join(lines) + "\n"


def _table(probe: Probe, metric: str) -> list[str]:
    rows = []
    for name, source in probe.sources.items():
        scores = probe.curve(name, HEAD, metric)
        if scores:
            merged = probe.merged(name, HEAD, metric) if source["kind"] != "twin" else {}
            cells = {**{str(k): p for k, p in scores.items()}, **merged}
            rows.append((name, {place: shown(point.interval) for place, point in cells.items()}))
    places = list(dict.fromkeys(place for _, cells in rows for place in cells))
    lines = [f"| | {' | '.join(map(place_name, places))} |", f"|---|{'---|' * len(places)}"]
    lines += [f"| {name} | {' | '.join(cells.get(place, '') for place in places)} |" for name, cells in rows]
    for name, source in probe.sources.items():
        point = probe.points.get((name, "none", HEAD, metric))
        if source["kind"] == "position" and point is not None:
            lines.append(f"| {name} | {shown(point.interval)} |{' |' * (len(places) - 1)}")
    return lines
