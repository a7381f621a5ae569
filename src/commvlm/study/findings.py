"""The study's verdicts and rows as a part of a Markdown page, finding by finding, each with its command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..app.marks import write_between
from .claims import COMMANDS, F, Verdict, title_of
from .experiments import EXPERIMENTS
from .inside import layer_weights, weights_table
from .report import intervals, verdicts_on, word_of
from .results import Results, read_results
from .runs import Places
from .settings import Scale
from .tables import LOSS, TITLES, adjusted_p, by_seed, cell, loss_cell, markdown, titled


def write_findings(page: Path, places: Places, scale: Scale) -> None:
    """Puts the study's findings between the page's marks `<!-- study: begin -->` and `<!-- study: end -->`.

    Raises ValueError without them.
    """
    results = read_results(places)
    write_between(page, "study", as_markdown(scale, results, verdicts_on(scale, results)))


def as_markdown(scale: Scale, results: Results, verdicts: Sequence[Verdict]) -> str:
    """Facts of the study, a table of claims per finding, and every row's scores."""
    world, runs = results.grid["world"], results.runs.values()
    hours = sum(sum(run["seconds"].values()) for run in runs) / 3600
    every = len({key for row in results.rows.values() for key in row["runs"].values()})
    made = f"{world['train']:,} training and {world['test']:,} test scenes; " if world else ""
    parts = [
        f"Scale {scale.name}: {made}{len(results.runs)} of {every} runs, {hours:.1f} hours one after another; steps, "
        "data and questions equal for every row. Differences in points (CIDEr times 100) with 95 % intervals "
        f"{intervals(results)}, paired. A verdict goes by its own interval; p is Holm's, over all claims that can be decided:"
        " only those under 0.05 stand when all are meant at once. A command trains a finding's rows; its intervals and p are "
        "those of all rows in the study's folder, for how far seeds lie apart is reckoned from all. Intervals of a row are "
        "symmetric and may pass 100.\n"
    ]
    for name in F:
        own = [verdict for verdict in verdicts if verdict.claim.finding == name]
        if own:
            command = f"commvlm study {COMMANDS[name]} --scale {word_of(results, scale)}"
            parts.append(f"**{f'{name}. ' if name.startswith('F') else ''}{title_of(name, scale)}** (`{command}`)\n")
            parts.append(_claims(own))
    parts += ["Every row that is done, mean over seeds:\n", _rows(results)]
    weights = weights_table(layer_weights(EXPERIMENTS["weights"].rows(scale), results))
    return "\n".join([*parts, *([markdown(weights)] if weights.rows else [])])


def _claims(verdicts: Sequence[Verdict]) -> str:
    lines = ["| claim | task | difference | by seed | p (Holm) | verdict |", "|---|---|---|---|---|---|"]
    for v in verdicts:
        said = f"**{v.word}**" + (f" ({v.why})" if v.why else "")
        task = titled(v.claim.task)
        lines.append(f"| {v.claim.says} | {task} | {cell(v.estimate)} | {by_seed(v)} | {adjusted_p(v)} | {said} |")
    return "\n".join([*lines, ""])


def _rows(results: Results) -> str:
    tasks = [task for task in TITLES if task in results.estimates]
    tasks += [task for task in results.estimates if task not in TITLES]
    titles = [*map(titled, tasks), LOSS]
    lines = ["| row | seeds | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(titles)]
    for name in results.rows:
        if results.seeds(name):
            cells = " | ".join(cell(results.estimates[task].get(name)) for task in tasks)
            lines.append(f"| {name} | {results.seeds(name)} | {cells} | {loss_cell(results, name)} |")
    return "\n".join([*lines, ""])
