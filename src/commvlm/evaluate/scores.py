"""Scores as a file and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .tasks import Score


def write_scores(scores: Mapping[str, Score], path: Path | str) -> Path:
    """The scores as JSON, whole or not at all; equal scores give equal bytes."""
    path = Path(path)
    content = {name: scores[name].as_json() for name in sorted(scores)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_scores(path: Path | str) -> dict[str, Score]:
    """What write_scores wrote. Raises ValueError for another kind of file."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: _score(values) for name, values in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of scores ({error}): score the predictions again") from error


def _score(values: Mapping[str, object]) -> Score:
    score = Score(**values)  # pyright: ignore[reportArgumentType]
    if score.interval is None:
        return score
    low, high = score.interval
    return Score(**{**values, "interval": (float(low), float(high))})  # pyright: ignore[reportArgumentType]


def cell(score: Score) -> str:
    """ "62.1 ± 1.1": the figure and its standard error, in percent."""
    error = "" if score.standard_error is None else f" ± {score.standard_error:.1f}"
    return f"{score.value:.1f}{error}"


def scores_table(columns: Mapping[str, Mapping[str, Score]]) -> str:
    """A Markdown table: one row per task, one column per model; figures in percent with their standard errors.

    columns: the name of each model -> its scores by task. A task that a model has no score for shows a dash; answers
    that could not be read are added as "(3 unparsable)".
    """
    rows = [["task", "metric", "n", *columns]]
    for task in sorted({name for scores in columns.values() for name in scores}):
        present = [scores[task] for scores in columns.values() if task in scores]
        metrics = " / ".join(dict.fromkeys(f"{score.metric} ({score.rule})" for score in present))
        sizes = " / ".join(dict.fromkeys(str(score.n) for score in present))
        rows.append([task, metrics, sizes, *(_entry(scores.get(task)) for scores in columns.values())])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _entry(score: Score | None) -> str:
    if score is None:
        return "–"
    return cell(score) + (f" ({score.unparsable} unparsable)" if score.unparsable else "")
