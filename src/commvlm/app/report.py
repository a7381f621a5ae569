"""The demo's report: one HTML file made of what the runs left behind. No figure in it comes from elsewhere."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from ..evaluate.predictions import read_predictions
from ..evaluate.scores import read_scores
from ..evaluate.tasks import Record, Score
from ..train.recipe import load_recipe
from .cards import read_cards, shipped_parts
from .charts import layer_chart, loss_chart
from .figures import chance_scores, constant_answers, detail_scores, sentences
from .showcase import Records, choose, show
from .variants import VARIANTS, overrides

MAIN, CHANCE = "comm", "chance"
TITLES = {
    "rec": "REC acc@0.5",
    "reg": "REG CIDEr",
    "pope": "POPE accuracy",
    "vqa": "VQA accuracy",
    "caption": "caption CIDEr",
}


def write_report(demo: Path, *, cards: Path | None = None) -> Path:
    """DEMO/report.html from DEMO/{comm, clip-last, random-twin, blind}; returns its path. Controls that are not
    evaluated are left out. cards: folder of the tiny checkpoints' cards, the shipped ones by default.

    Raises ValueError when COMM's own run is not evaluated, or when a file of a run is broken.
    """
    names = [name for name in VARIANTS if (demo / name / "scores.json").exists()]
    if MAIN not in names:
        raise ValueError(f"{demo / MAIN} is not evaluated (no scores.json); run `commvlm quickstart --out {demo}`")
    labels = {name: VARIANTS[name].label for name in names}
    records = {labels[name]: _predictions(demo / name / "predictions") for name in names}
    scores = {labels[name]: read_scores(demo / name / "scores.json") for name in names}
    page = _template().render(
        main=labels[MAIN],
        changes={labels[name]: VARIANTS[name].change for name in names} | {CHANCE: "one constant answer (see below)"},
        sentences=sentences(scores, main=labels[MAIN], titles=TITLES),
        commands=_commands(demo, names, records[labels[MAIN]]),
        world=_read(demo / "world" / "world.json") if (demo / "world" / "world.json").exists() else None,
        cards=read_cards(shipped_parts() if cards is None else cards),
        **_tables(scores, records, main=labels[MAIN]),
        **_runs(demo, labels),
        **_pictures(demo, records, main=labels[MAIN]),
    )
    return _write(demo / "report.html", page)


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["minutes"] = lambda seconds: f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
    return environment.from_string((resources.files("commvlm.app") / "report.html").read_text(encoding="utf-8"))


def _tables(scores: Mapping[str, Mapping[str, Score]], records: Mapping[str, Records], *, main: str) -> dict[str, Any]:
    """The two tables: tasks, and groups of questions; a row for each run and one for the constant answer."""
    details = {label: detail_scores(by_task) for label, by_task in records.items()}
    details[CHANCE] = detail_scores(constant_answers(records[main]))
    return {
        "titles": TITLES,
        "rows": {**scores, CHANCE: chance_scores(records[main])},
        "detail_titles": {title: title for row in details.values() for title in row},
        "detail_rows": details,
    }


def _runs(demo: Path, labels: Mapping[str, str]) -> dict[str, Any]:
    """What run.json, recipe.yaml and log.jsonl say, and the charts."""
    facts = {label: _read(demo / name / "run.json") for name, label in labels.items()}
    logs = {label: _log(demo / name / "log.jsonl") for name, label in labels.items()}
    recipe = load_recipe(demo / MAIN / "recipe.yaml")
    weights = facts[labels[MAIN]]["layer_weights"]
    greek = _greek(len(weights))
    named = {f"{letter}, {name}": weights[name] for letter, name in zip(greek, weights, strict=True)}
    return {
        "runs": facts,
        "stages": recipe.train.stages,
        "seed": recipe.train.seed,
        "losses": Markup(loss_chart(logs)) if any(logs.values()) else "",
        "layers": Markup(layer_chart(named)),
    }


def _greek(count: int) -> list[str]:
    """The paper's letters: alpha weighs CLIP's layers, beta DINOv2's."""
    return (["α", "β", "γ", "δ"] + ["weights"] * count)[:count]


def _pictures(demo: Path, records: Mapping[str, Records], *, main: str) -> dict[str, Any]:
    others = {label: by_task for label, by_task in records.items() if label != main}
    shown = [show(record, others, images=demo / "world" / "images") for record in choose(records[main])]
    return {"shown": [picture for picture in shown if picture is not None], "missing": shown.count(None)}


def _commands(demo: Path, names: Sequence[str], records: Records) -> list[tuple[str, str]]:
    """What each command does, and the command."""
    folder = _as_typed(demo)
    lines = [("all of it", f"commvlm quickstart --out {shlex.quote(str(folder))}")]
    for name in names:
        run = folder / name
        train = ["commvlm", "train", "micro", "--out", str(run), *overrides(name, world=folder / "world")]
        lines.append((VARIANTS[name].label, f"{shlex.join(train)}\n{shlex.join(['commvlm', 'evaluate', str(run)])}"))
    asked = next((r for r in choose(records) if r.task == "rec" and r.image), None)
    if asked is not None:
        image = folder / "world" / "images" / Path(str(asked.image)).name
        question = asked.question.partition("\n")[2]
        lines.append(("ask it", shlex.join(["commvlm", "chat", str(folder), question, "--image", str(image)])))
    return lines


def _as_typed(path: Path) -> Path:
    """The path from where the command runs, when it is below."""
    here, there = Path.cwd(), path.resolve()
    return there.relative_to(here) if there.is_relative_to(here) else path


def _predictions(folder: Path) -> dict[str, list[Record]]:
    by_task: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read_predictions(path):
            by_task.setdefault(record.task, []).append(record)
    return by_task


def _log(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's log; none where it was too short to log anything."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: a line is no JSON ({error.msg}); train the run again") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error.msg}); make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; make it again")
    return content


def _write(path: Path, page: str) -> Path:
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)
    return path
