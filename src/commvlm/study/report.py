"""The study's report: one HTML file, and the same figures as CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..evaluate.receipts import write_json
from ..model.storage import write_text
from .claims import COMMANDS, Claim, F, Verdict, claims_of, is_reading, judged, title_of
from .experiments import EXPERIMENTS
from .figures import chart_of, learning_of, saved
from .gallery import gallery
from .inside import alignments, alignments_table, as_facts, layer_weights, weights_table
from .paper import PAPER, PAPER_WORDS
from .results import Results, costs, read_results
from .rows import Row
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
    for folder in (places.figures, places.root / "tables"):
        folder.mkdir(parents=True, exist_ok=True)
    sections = [_section(name, scale, results, places) for name in results.grid["experiments"]]
    taken = {name: cost for section in sections for name, cost in section["costs"].items()}
    table = verdicts_of("What the paper claims, and controls", verdicts)
    tables = {section["name"]: section["table"] for section in sections if section["table"].rows} | {"claims": table}
    tables |= {f"{section['name']}-inside": section["beside"] for section in sections if section["beside"]}
    for name, found in tables.items():
        write_text(places.root / "tables" / f"{name}.md", markdown(found))
        write_text(places.root / "tables" / f"{name}.tex", latex(found))
    write_text(places.root / "results.csv", as_csv(results))
    inside = as_facts(EXPERIMENTS["weights"].rows(scale), EXPERIMENTS["collapse"].rows(scale), results)
    write_json(as_json(results, verdicts, taken) | inside, places.root / "results.json")
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
            learning=Markup(learning_of(places, results, scale)),
            gallery=gallery(places, results, scale),
            receipts=_receipts(results),
            pictures=[_inline(path) for path in pictures],
            versions=next((result["versions"] for result in results.runs.values()), {}),
        )
    )
    write_text(places.root / "report.html", page)
    return places.root / "report.html"


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
        "beside": _beside(name, rows, results),
        "costs": taken,
        "measured": measured_with(taken),
        "chart": Markup(saved(chart_of(name, experiment, rows, tasks, results), places.figures / f"{name}.svg")),
        "panels": 1 if experiment.over or name in ("weights", "collapse") else len(tasks),
        "paper": PAPER.get(name),
        "words": _words(name, rows, scale),
    }


def _beside(name: str, rows: Sequence[Row], results: Results) -> Table | None:
    """What an experiment's runs tell beside scores, if they do."""
    found = {
        "weights": lambda: weights_table(layer_weights(rows, results)),
        "collapse": lambda: alignments_table(alignments(rows, results)),
    }
    table = found[name]() if name in found else None
    return table if table and table.rows else None


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


def _receipts(results: Results) -> list[dict[str, Any]]:
    return [
        {"row": name, "seed": seed, "key": result["key"], "from": result.get("from", ""), **result["seconds"]}
        for name in results.rows
        for seed, result in sorted(results.of_row(name).items())
    ]


def _inline(picture: Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
