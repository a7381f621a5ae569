"""A run's own questions, asked of its own model: predictions first, then scores from the files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..data.example import Example
from ..evaluate.run import predict, score
from ..evaluate.scores import read_scores, write_scores
from ..evaluate.tasks import Score, task_named
from ..train.recipe import Recipe, load_recipe
from ..train.sources import named_examples
from .answering import Answerer


def evaluate_run(run: Path, *, tasks: Sequence[str] = (), overrides: Sequence[str] = ()) -> dict[str, Score]:
    """Writes RUN/predictions/{task}.jsonl, then RUN/scores.json, and returns the scores; those of other tasks stay in it.

    tasks: which of those that the recipe asks; all by default. overrides: recipe options, such as another data.root.
    Raises ValueError for a folder that is no finished run, and for a task that the recipe does not ask.
    """
    for file in ("run.json", "recipe.yaml"):
        if not (run / file).is_file():
            raise ValueError(f"{run} is no finished run: it has no {file}; train it first (commvlm train)")
    recipe = load_recipe(run / "recipe.yaml", overrides)
    by_task = _asked(recipe, tasks)
    answer = Answerer(
        run, max_new_tokens=recipe.evaluate.max_new_tokens, batch_size=recipe.evaluate.batch, images=_images(run)
    )
    scores: dict[str, Score] = {}
    for name in sorted(by_task):
        path = predict(
            answer, by_task[name], run / "predictions" / f"{name}.jsonl",
            batch_size=8 * recipe.evaluate.batch, progress=name,
        )  # fmt: skip
        scores |= score(path)
    kept = read_scores(run / "scores.json") if tasks and (run / "scores.json").exists() else {}
    write_scores({**kept, **scores}, run / "scores.json")
    return scores


def _asked(recipe: Recipe, tasks: Sequence[str]) -> dict[str, list[Example]]:
    """The examples of each wanted task. Raises ValueError for a task that there is not or that the recipe does not ask."""
    for name in tasks:
        task_named(name)
    if not recipe.evaluate.sources:
        raise ValueError("the recipe asks nothing: name what is asked in evaluate.sources")
    found: dict[str, list[Example]] = {}
    for examples in named_examples(recipe.evaluate.sources, Path(recipe.data.root)).values():
        for example in examples:
            found.setdefault(task_named(example.task).name, []).append(example)
    lacking = [name for name in tasks if name not in found]
    if lacking:
        raise ValueError(f"the recipe asks nothing of task {lacking[0]!r}; it asks {', '.join(sorted(found))}")
    return {name: found[name] for name in tasks or found}


def _images(run: Path) -> str:
    """What the run was trained to see: "given" images, or "grey" ones."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'run.json'} is none that commvlm train wrote; train the run again") from error
