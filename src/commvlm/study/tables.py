"""The study's tables as data, and as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .claims import REC_IOU, Verdict, p_of
from .results import Results
from .rows import Row
from .statistics import Estimate
from .tallies import Tally

TITLES = {
    "rec": "REC acc@0.5",
    REC_IOU: "REC mean IoU",
    "reg": "REG CIDEr",
    "pope": "POPE accuracy",
    "vqa": "VQA accuracy",
    "caption": "caption CIDEr",
}
LOSS = "training loss at the end, by seed"
BRANCHES = "encoders and their layers"
COSTS = ("parameters M", "GFLOPs", "tokens", "ms", "MB")


def titled(task: str) -> str:
    """A task, one set of it ("vqa.okvqa") or a reading of either, for people."""
    named, _, reading = task.partition(" ")
    family, _, own = named.partition(".")
    whole = f"{family} {reading}".strip()
    return TITLES.get(whole, whole) + (f", {own}" if own else "")


@dataclass(frozen=True)
class Table:
    """head: column titles. rows: a name, then a cell per column. Cells are texts, as they are printed."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def cell(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def loss_cell(results: Results, name: str) -> str:
    """Of each seed, in their order; nats a token."""
    return ", ".join(f"{loss:.3f}" for loss in results.late_losses(name)) or "–"


def cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """Of the visual half: millions of parameters, GFLOPs, visual tokens, milliseconds and megabytes of one image."""
    measured = cost["measured"]
    taken = (
        ["–", "–"] if measured is None else [f"{1e3 * measured['seconds']:.1f}", f"{measured['peak_bytes'] / 1e6:.1f}"]
    )
    return [f"{cost['parameters'] / 1e6:.2f}", f"{cost['flops'] / 1e9:.3g}", str(cost["tokens"]), *taken]


def _cost_facts(cost: Mapping[str, Any]) -> dict[str, Any]:
    """What `cost_cells` shows, as numbers, and how the last two were measured."""
    facts = {name: cost[name] for name in ("parameters", "flops", "tokens")}
    measured = cost["measured"]
    if measured is not None:
        facts |= {"ms": round(1e3 * measured["seconds"], 2), "mb": round(measured["peak_bytes"] / 1e6, 2)}
        facts |= {name: measured[name] for name in ("dtype", "threads", "device") if name in measured}
    return facts


def measured_with(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """How milliseconds and megabytes were measured: "bf16, 2 threads, cpu"; nothing where none were."""
    ways = {_way(cost["measured"]) for cost in costs.values() if cost["measured"]}
    return " or ".join(sorted(ways))


def _way(measured: Mapping[str, Any]) -> str:
    threads = measured["threads"]
    parts = [measured["dtype"], f"{threads} thread{'s' if threads > 1 else ''}", measured.get("device")]
    return ", ".join(part for part in parts if part)  # files of earlier versions name no device


def scores_of(
    title: str, rows: Sequence[Row], tasks: Sequence[str], results: Results, costs: Mapping[str, Mapping[str, Any]]
) -> Table:
    """One line per row: seeds, each task's mean and 95 % interval, losses, what the visual half costs."""
    lines = []
    for row in rows:
        found = [cell(results.estimates.get(task, {}).get(row.name)) for task in tasks]
        shown = [row.name, str(results.seeds(row.name)), *found, loss_cell(results, row.name)]
        lines.append([*shown, *cost_cells(costs[row.name])])
    return Table(title, ["row", "seeds", *map(titled, tasks), LOSS, *COSTS], lines)


def with_branches(table: Table, rows: Sequence[Row]) -> Table:
    """The table of these rows, and which layers of which checkpoints each of them reads."""
    lines = [[*line, _branches(row)] for line, row in zip(table.rows, rows, strict=True)]
    return replace(table, head=[*table.head, BRANCHES], rows=lines)


def _branches(row: Row) -> str:
    read = []
    for branch in row.model.encoders:
        layers = branch.layers if isinstance(branch.layers, list) else [branch.layers]
        read.append(f"{branch.checkpoint}: {', '.join(map(str, layers))}")
    return "; ".join(read)


def verdicts_of(title: str, verdicts: Sequence[Verdict]) -> Table:
    """One line per claim."""
    lines = [
        [
            f"{v.claim.finding}: {v.claim.says}", titled(v.claim.task), v.claim.expect,
            cell(v.estimate), by_seed(v), f"{p_of(v.estimate, v.claim.expect):.3f}", adjusted_p(v),
            f"{v.word} ({v.why})" if v.why else v.word,
        ]
        for v in verdicts
    ]  # fmt: skip
    return Table(title, ["claim", "task", "expected", "difference", "by seed", "p", "p (Holm)", "verdict"], lines)


def by_seed(verdict: Verdict) -> str:
    """The difference with each seed that its rows have in common, in the seeds' order."""
    return ", ".join(f"{value:.1f}" for value in _by_seed(verdict, 1))


def _by_seed(verdict: Verdict, decimals: int) -> list[float]:
    found = verdict.estimate.seeds
    return [round(found[seed], decimals) + 0.0 for seed in sorted(found)]  # no minus before a zero


def adjusted_p(verdict: Verdict) -> str:
    return "–" if verdict.adjusted is None else f"{verdict.adjusted:.3f}"


def markdown(table: Table) -> str:
    """A Markdown table under its title."""
    lines = [list(table.head), *(list(row) for row in table.rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(table.head))]
    text = [
        "| " + " | ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"### {table.title}\n\n" + "\n".join(text) + "\n"


_ESCAPES = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "–": "--", "+": "{+}"}


def latex(table: Table) -> str:
    """A LaTeX table for booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_ESCAPES.get(char, char) for char in text) for text in cells) + r" \\"

    body = [r"\begin{table}", r"\centering", rf"\caption{{{line([table.title])[:-3]}}}"]
    body += [rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule", line(table.head), r"\midrule"]
    return "\n".join([*body, *map(line, table.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def as_csv(results: Results) -> str:
    """One line per run and figure of a task: row, seed, key, task, metric, value, n, seconds of training."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["row", "seed", "key", "task", "metric", "rule", "value", "n", "unparsable", "train_seconds"])
    for name in results.rows:
        for seed, result in sorted(results.of_row(name).items()):
            scores = dict(result["scores"])
            for reading in sorted(result["tallies"].keys() - scores.keys()):  # such as REC's overlap
                task, metric = reading.split(" ", 1)
                value = Tally.from_json(result["tallies"][reading]).value()
                scores[reading] = {**scores[task], "metric": metric, "value": value}
            for task, score in sorted(scores.items()):
                writer.writerow(
                    [
                        name, seed, result["key"], task, score["metric"], score["rule"], score["value"], score["n"],
                        score["unparsable"], round(result["seconds"]["train"], 1),
                    ]
                )  # fmt: skip
    return out.getvalue()


def as_json(results: Results, verdicts: Sequence[Verdict], costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Estimates, costs and verdicts: small enough to be kept in a repository. costs: of rows, as `results.costs` has them."""
    return {
        "scale": results.grid["scale"],
        "world": results.grid["world"],
        "seconds": sum(sum(result["seconds"].values()) for result in results.runs.values()),
        "runs": len(results.runs),
        "rows": {
            name: {
                "seeds": results.seeds(name),
                "training_loss": [round(loss, 4) for loss in results.late_losses(name)],
                **({"costs": _cost_facts(costs[name])} if name in costs else {}),
                **{
                    task: [round(value, 3) for value in (found[name].mean, found[name].low, found[name].high)]
                    for task, found in results.estimates.items()
                    if name in found
                },
            }
            for name in results.rows
            if results.seeds(name)
        },
        "claims": [
            {
                "finding": v.claim.finding, "says": v.claim.says, "task": v.claim.task, "expected": v.claim.expect,
                "difference": [round(value, 3) for value in (v.estimate.mean, v.estimate.low, v.estimate.high)],
                "by_seed": _by_seed(v, 3), "p": round(p_of(v.estimate, v.claim.expect), 5),
                "p_holm": v.adjusted and round(v.adjusted, 5),
                "verdict": v.word,
            }
            for v in verdicts
        ],
    }  # fmt: skip
