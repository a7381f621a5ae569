"""The probe's page: curves, maps, findings, advice and table in one HTML file, made of what the probe left behind."""

from __future__ import annotations

import base64
import os
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..model.storage import write_text
from ..probe.advise import Agreement, advise, agreement, place_name, said, scores_of, shown
from ..probe.curves import Probe
from ..probe.findings import as_markdown, findings
from ..probe.tasks import METRICS, TITLES
from ..probe.trained import read_trained
from .marks import write_between
from .probe_charts import curves_chart

TRAINED = "trained.json"
"""In the probe's folder: what trained models scored, when `commvlm probe advise --trained` was given it."""
ABOUT = {
    "rec": "A head on each patch says which words name the object there and where its edges are; the patch that most looks "
    "like the asked words gives the box.",
    "pointing": "Whether the centre of that patch lies in the true box.",
    "auc": "From the mean patch token: how often an image with a category scores above one without, mean over categories.",
    "pope": "The same head asked about as many present as absent categories.",
    "category": "The category of every patch that an object owns.",
    "region": "The share of an object's words among as many of the likeliest ones, from the mean of its patches.",
}  # fmt: skip


def write_probe_report(out: Path) -> Path:
    """OUT/findings.md and OUT/report.html, from OUT's results alone; returns the page's path."""
    probe = Probe(out)
    write_text(out / "findings.md", as_markdown(probe))
    main = "mlp" if "mlp" in probe.heads() else probe.heads()[0]
    page = _template().render(
        asked=probe.record["asked"],
        train=probe.record["train"],
        test=probe.record["test"],
        encoders=[probe.sources[name] for name in probe.encoders()],
        titles=TITLES,
        about=ABOUT,
        main=main,
        charts={m: Markup(curves_chart(probe, main, m)) for m in probe.metrics()},
        others=[
            Markup(curves_chart(probe, head, m)) for head in probe.heads() if head != main for m in probe.metrics()
        ],
        findings=findings(probe) if main == "mlp" else [],
        advices=[said(advise(probe, task, head=main)) for task in METRICS if METRICS[task][0] in probe.metrics()],
        agreements=agreements(probe, out / TRAINED, head=main) if (out / TRAINED).exists() else {},
        maps={name: _embedded(path) for name, path in _maps(out).items()},
        tables={m: _rows(probe, main, m) for m in probe.metrics()},
    )
    part = out / "report.part"
    part.write_text(page, encoding="utf-8")
    os.replace(part, out / "report.html")
    return out / "report.html"


def write_into(page: Path, out: Path) -> None:
    """Puts OUT's findings between the page's two marks. Raises ValueError without them."""
    write_between(page, "probe", as_markdown(Probe(out)))


def agreements(probe: Probe, trained: Path, *, head: str = "mlp") -> dict[str, Agreement]:
    """Task -> how well the probe ranked what was trained. Raises ValueError for a task that is none of the probe's."""
    found = {}
    depths = {name: probe.sources[name]["depth"] for name in probe.encoders()}
    for task, models in read_trained(trained, depths).items():
        if task not in METRICS:
            raise ValueError(f"{trained}: there is no task {task!r}; tasks: {', '.join(METRICS)}")
        found[task] = agreement(scores_of(probe, METRICS[task][0], head=head), models)
    return found


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["shown"] = shown
    return environment.from_string((resources.files("commvlm.app") / "probe.html").read_text(encoding="utf-8"))


def _maps(out: Path) -> dict[str, Path]:
    paths = {name: out / "maps" / f"{name}.png" for name in ("similarity", "principal")}
    return {name: path for name, path in paths.items() if path.exists()}


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _rows(probe: Probe, head: str, metric: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(source, kind, [(place, score)])."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for (source, place, kind, of), point in probe.points.items():
        if (kind, of) == (head, metric):
            rows.setdefault(source, []).append((place, shown(point.interval)))
    return [
        (name, probe.sources[name]["kind"], [(place_name(place), score) for place, score in sorted(cells, key=_place)])
        for name, cells in rows.items()
    ]


def _place(cell: tuple[str, str]) -> tuple[bool, int]:
    """Layers by their number, then merges."""
    return not cell[0].isdigit(), int(cell[0]) if cell[0].isdigit() else 0
