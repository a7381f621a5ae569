"""The study's report: one HTML file, and the same figures as CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import base64
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..app.charts import layer_chart
from ..app.showcase import choose, show
from ..evaluate.predictions import read_predictions
from ..evaluate.receipts import write_json
from ..evaluate.tasks import Record
from . import charts
from .claims import COMMANDS, Claim, F, Verdict, claims_of, is_reading, judged, title_of
from .controls import BLIND, RANDOM_TWIN
from .experiments import EXPERIMENTS, Experiment, table_1
from .paper import PAPER, PAPER_WORDS
from .results import Results, costs, read_results
from .rows import Row, comm, pair, single_name
from .runs import Places
from .settings import Scale
from .tables import (
    Table,
    as_csv,
    as_json,
    by_seed,
    latex,
    markdown,
    measured_with,
    scores_of,
    titled,
    verdicts_of,
    with_branches,
)

BRANCHES = {"holds": "✓ holds", "reversed": "✗ reversed", "undecided": "? undecided"}
MUON = (
    "Here Muon trains matrices alone: the convolutions of Conv-Layerscale are trained by AdamW, the other merges' "
    "linear maps by Muon, so its rows differ from theirs by the optimizer, too."
)


def write_report(places: Places, scale: Scale) -> Path:
    """ROOT/report.html, tables/, results.csv and results.json from what is done; returns the page's path.

    Raises ValueError where nothing is done yet, or the folder is another scale's.
    """
    from .runs import failed

    results = read_results(places)
    if results.grid["scale"] != scale.name:
        raise ValueError(f"{places.root} holds a study of scale {results.grid['scale']!r}, not {scale.name!r}")
    pictures = sorted(places.figures.glob("figure-1-*.png"))
    if not results.runs and not pictures:
        raise ValueError(f"{places.root}: no run is done, there is nothing to report; see {places.root / 'logs'}")
    verdicts = verdicts_on(scale, results)
    sections = [_section(name, scale, results, places) for name in results.grid["experiments"]]
    taken = {name: cost for section in sections for name, cost in section["costs"].items()}
    table = verdicts_of("What the paper claims, and controls", verdicts)
    tables = {section["name"]: section["table"] for section in sections if section["table"].rows} | {"claims": table}
    for name, found in tables.items():
        _write(places.root / "tables" / f"{name}.md", markdown(found))
        _write(places.root / "tables" / f"{name}.tex", latex(found))
    _write(places.root / "results.csv", as_csv(results))
    write_json(as_json(results, verdicts, taken), places.root / "results.json")
    keys = {key for row in results.rows.values() for key in row["runs"].values()}
    failed_here = [about for key, about in failed(places).items() if key in keys]
    page = (
        _environment()
        .get_template("report.html")
        .render(
            scale=scale,
            word=word_of(results, scale),
            grid=results.grid,
            done=len(results.runs),
            total=len(keys),
            goes_on=command(results.grid["experiments"], places, scale, results),
            failed=Table(
                "Runs that failed",
                ["row", "seed", "reason"],
                [[one["row"], str(one["seed"]), one["reason"]] for one in failed_here],
            ),
            hours=sum(sum(r["seconds"].values()) for r in results.runs.values()) / 3600,
            findings=_findings(claims_on(scale, results), verdicts, scale),
            trains={name: command(COMMANDS[name].split(), places, scale, results) for name in F},
            seeds=seeds_done(results),
            claims=sum(v.adjusted is not None for v in verdicts),
            intervals=intervals(results),
            sections=sections,
            words=BRANCHES,
            learning=Markup(_learning(places, results, scale)),
            shown=_gallery(places, results, scale),
            receipts=_receipts(results),
            pictures=[_inline(path) for path in pictures],
            versions=next((result["versions"] for result in results.runs.values()), {}),
        )
    )
    return _write(places.root / "report.html", page)


def claims_on(scale: Scale, results: Results) -> list[Claim]:
    """The scale's claims, but those about two names of one run, which say nothing."""
    keys = {name: frozenset(row["runs"].values()) for name, row in results.rows.items()}
    return [c for c in claims_of(scale) if len({keys.get(name, name) for name in c.terms}) == len(c.terms)]


def verdicts_on(scale: Scale, results: Results) -> list[Verdict]:
    """What the scale's claims come to, with the rows that are done."""
    return judged(claims_on(scale, results), results.estimates)


def intervals(results: Results) -> str:
    """What intervals are over."""
    several = any(results.seeds(name) > 1 for name in results.rows)
    return "over seeds and images" if several else "over images alone, of one seed: they say nothing of others"


def command(names: Sequence[str], places: Places, scale: Scale, results: Results) -> str:
    """What trains the runs of these experiments that are not done, in the study's folder."""
    words = [
        "commvlm",
        "study",
        *(["all"] if set(names) == set(EXPERIMENTS) else names),
        "--scale",
        word_of(results, scale),
    ]
    most = max(_planned_seeds(results), default=0)
    own = bool(scale.more_seeds) and most <= max(map(scale.seeds_of, results.rows), default=0)
    words += ["--seeds", str(most)] if results.rows and not own else []
    words += [] if results.grid["world"] else ["--data", "DIR"]
    words += [] if places.root.resolve() == (Path("runs/study") / scale.name).resolve() else ["--out", str(places.root)]
    return shlex.join(words)


def word_of(results: Results, scale: Scale) -> str:
    """By which a command finds the scale: its name, or the file that it was read from."""
    return results.grid.get("word", scale.name)


def _planned_seeds(results: Results) -> list[int]:
    """The numbers of seeds that rows are to have, ascending."""
    return sorted({len(row["runs"]) for row in results.rows.values()})


def seeds_done(results: Results) -> str:
    """How many seeds rows have, and of how many where some are not done: "1 to 3 of 3 seeds are done"; nothing of no rows."""
    planned = _range(_planned_seeds(results))
    done = {name: results.seeds(name) for name in results.rows}
    if all(done[name] == len(row["runs"]) for name, row in results.rows.items()):
        return f"{planned} seed{'' if planned == '1' else 's'}" if done else ""
    return f"{_range(sorted(done.values()))} of {planned} seeds are done"


def _range(counts: Sequence[int]) -> str:
    """ "3", or "3 to 6", of ascending counts."""
    return " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))


def _environment() -> Environment:
    from jinja2 import PackageLoader

    environment = Environment(
        loader=PackageLoader("commvlm.study", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["signed"] = lambda value: f"{value:+.1f}"
    style = (resources.files("commvlm.app") / "report.html").read_text(encoding="utf-8")
    environment.globals |= {"by_seed": by_seed, "titled": titled}
    environment.globals["style"] = Markup(style[style.index("<style>") + 7 : style.index("</style>")])
    return environment


def _findings(claims: Sequence[Claim], verdicts: Sequence[Verdict], scale: Scale) -> list[dict[str, Any]]:
    """Finding by finding, of those that the scale's rows can speak to: its verdicts, whether claims lack rows, and how many
    have them and what these come to, in words."""
    found = []
    for name in F:
        own = [v for v in verdicts if v.claim.finding == name]
        plain = [v for v in own if not is_reading(v.claim.task)]
        beside = _counted([v for v in own if is_reading(v.claim.task)])
        every = sum(c.finding == name and not is_reading(c.task) for c in claims)
        if not every:
            continue
        said = f"{len(plain)} of {every} claim{'s have their' if every > 1 else ' has its'} rows"
        said += f": {_counted(plain)}" if plain else ""
        said += f"; by REC's mean IoU, {beside}" if beside else ""
        lacks = len(plain) < every
        found.append({"name": name, "title": title_of(name, scale), "verdicts": own, "said": said, "lacks": lacks})
    return found


def _counted(verdicts: Sequence[Verdict]) -> str:
    """ "1 holds, 2 undecided"; nothing of none."""
    counts = Counter(v.word for v in verdicts)
    return ", ".join(f"{counts[word]} {word}" for word in BRANCHES if counts[word])


def _section(name: str, scale: Scale, results: Results, places: Places) -> dict[str, Any]:
    """One experiment: its table, its chart, the paper's figures or words."""
    experiment = EXPERIMENTS[name]
    rows = experiment.rows(scale)
    asked = experiment.tasks or scale.tasks
    tasks = list(dict.fromkeys(name for task in asked for name in results.estimates if _is_of(name, task)))
    taken = costs({row.name: row for row in rows}, places.root / "costs.json", runs=0)
    table = scores_of(experiment.title, rows, tasks, results, taken)
    return {
        "name": name,
        "experiment": experiment,
        "table": with_branches(table, rows) if name == "peers" else table,
        "costs": taken,
        "measured": measured_with(taken),
        "chart": Markup(_saved(_chart(name, experiment, rows, tasks, results), places.figures / f"{name}.svg")),
        "panels": 1 if experiment.over or name in ("weights", "collapse") else len(tasks),
        "paper": PAPER.get(name),
        "words": _words(name, rows, scale),
    }


def _words(name: str, rows: Sequence[Row], scale: Scale) -> list[str]:
    """What is said under an experiment's table."""
    words = [PAPER_WORDS[name]] if name in PAPER_WORDS else []
    if scale.base.train.optimizer == "muon" and any(row.at.get("merge") == "conv-layerscale" for row in rows):
        words.append(MUON)
    return words


def _is_of(name: str, task: str) -> bool:
    """Whether a figure is a task's, one of its sets', or a reading of either."""
    named = name.split()[0]
    return task in (named, named.split(".")[0])


def _saved(chart: str, path: Path) -> str:
    """The chart, kept as a file of its own, too."""
    if chart:
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'  # a page needs none
        _write(path, chart if "xmlns:xlink" in chart else chart.replace("<svg ", f"<svg {spaces} ", 1))
    return chart


def _chart(name: str, experiment: Experiment, rows: Sequence[Row], tasks: Sequence[str], results: Results) -> str:
    found = {task: results.estimates[task] for task in tasks}
    if not any(row.name in found[task] for row in rows for task in tasks):
        return ""
    if name == "weights":
        return _weights(rows, results)
    if name == "collapse":
        facts = _alignments(rows, results)
        return charts.alignments(facts) if facts else ""
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
        runs = list(results.of_row(row.name).values()) if row.name in results.rows else []
        for encoder in runs[0]["layer_weights"] if runs else ():
            values = [run["layer_weights"].get(encoder, {}) for run in runs]
            layers = [layer for layer in values[0] if all(layer in v for v in values)]
            if layers:
                mean = {layer: sum(v[layer] for v in values) / len(values) for layer in layers}
                found[encoder if len(row.model.encoders) == 1 else f"{encoder} in {row.name}"] = mean
    return layer_chart(found) if found else ""


def _alignments(rows: Sequence[Row], results: Results) -> dict[str, Any]:
    """Row -> what its first seed's run measured in the alignment."""
    found = {}
    for row in rows:
        runs = results.of_row(row.name) if row.name in results.rows else {}
        facts = runs[min(runs)]["alignments"] if runs else {}
        if facts:
            found[row.name] = next(iter(facts.values()))
    return found


def _learning(places: Places, results: Results, scale: Scale) -> str:
    """How the rows of Table 1 came to see, between a random second encoder and no image."""
    names = [*(row.name for row in table_1(scale)), RANDOM_TWIN, BLIND]
    found = {name: results.of_row(name) for name in names if name in results.rows}
    every = {name: [run["losses"] for run in runs.values() if run["losses"]] for name, runs in found.items()}
    losses = {name: seeds for name, seeds in every.items() if seeds}
    return _saved(charts.learning(losses), places.figures / "learning.svg") if losses else ""


def _gallery(places: Places, results: Results, scale: Scale) -> list[Any]:
    """A dozen questions drawn by lot, the whole model's answers with the controls' beside them."""
    main, lasts = comm(scale).name, [single_name(given, given.last) for given in pair(scale)]
    beside = [name for name in results.rows if name != main and (name.startswith("COMM") or name in lasts)]
    answers = {name: _answers(places, results, name) for name in [main, *beside]}
    if not answers.get(main):
        return []
    others = {name: found for name, found in answers.items() if name != main and found}
    shown = [show(record, others, images=places.root / "world" / "images") for record in choose(answers[main])]
    return [picture for picture in shown if picture is not None]


def _answers(places: Places, results: Results, name: str) -> dict[str, list[Record]]:
    """A row's answers by task, of its first seed. Their ids begin with their set, since two sets may share one."""
    runs = results.of_row(name) if name in results.rows else {}
    by_task: dict[str, list[Record]] = {}
    for path in sorted((places.run(runs[min(runs)]["key"]) / "predictions").glob("*.jsonl")) if runs else ():
        for record in read_predictions(path):
            by_task.setdefault(record.task, []).append(replace(record, id=f"{path.stem} {record.id}"))
    return by_task


def _receipts(results: Results) -> list[dict[str, Any]]:
    return [
        {"row": name, "seed": seed, "key": result["key"], "from": result.get("from", ""), **result["seconds"]}
        for name in results.rows
        for seed, result in sorted(results.of_row(name).items())
    ]


def _inline(picture: Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path
