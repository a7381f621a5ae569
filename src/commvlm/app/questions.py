"""What a recipe asks: sets of questions, each of one task, asked and scored together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.example import Example
from ..data.readers import task_of
from ..evaluate.tasks import TASKS, task_named
from ..train.recipe import Recipe, Source
from ..train.sources import named_examples


@dataclass(frozen=True)
class Questions:
    """name: the task's, or "rec.refcoco-val" where several sources ask one task: benchmarks are not thrown together. The part
    after the dot is the source's name, less "rec-" at its head. A task that is defined over all of its sources (POPE's three
    sets) is one set whatever their number."""

    name: str
    task: str
    examples: Sequence[Example]
    sources: Sequence[Source]


def questions_of(recipe: Recipe, tasks: Sequence[str] = ()) -> list[Questions]:
    """The sets that a recipe asks. tasks: the wanted ones, by a task's name (all its sets) or a set's; all by default.

    Files of other tasks need not be there. Raises ValueError for a task that there is not, or that the recipe does not ask,
    and for a rule that its task has not.
    """
    for name in tasks:
        task_named(name.split(".")[0])
    for name, rule in recipe.evaluate.rules.items():
        task_named(name).rule_named(rule)
    if not recipe.evaluate.sources:
        raise ValueError("the recipe asks nothing: name what is asked in evaluate.sources")
    others = {source.name: task for source in recipe.evaluate.sources if (task := _other_task(source, tasks))}
    sources = [source for source in recipe.evaluate.sources if source.name not in others]
    read = named_examples(sources, Path(recipe.data.root))
    asked: dict[str, list[tuple[Source, list[Example]]]] = {}
    for source in sources:
        for task in dict.fromkeys(task_named(example.task).name for example in read[source.name]):
            own = [example for example in read[source.name] if example.task == task]
            asked.setdefault(task, []).append((source, own))
    sets = [one for task, parts in asked.items() for one in _sets(task, parts)]
    for name in tasks:
        if not any(name in (one.name, one.task) for one in sets):
            there = ", ".join(sorted({*(one.name for one in sets), *others.values()}))
            raise ValueError(f"the recipe asks nothing of {name!r}; it asks {there}")
    return [one for one in sets if not tasks or one.name in tasks or one.task in tasks]


def _other_task(source: Source, tasks: Sequence[str]) -> str | None:
    """The task of a source that is none of the wanted ones, where that can be told without reading it."""
    task = task_of(source.format, source.options)
    if not tasks or task not in TASKS:
        return None
    return None if task in {wanted.split(".")[0] for wanted in tasks} else task


def _sets(task: str, parts: Sequence[tuple[Source, list[Example]]]) -> list[Questions]:
    if len(parts) == 1 or task_named(task).whole:
        every = [example for _, own in parts for example in own]
        return [Questions(task, task, every, [source for source, _ in parts])]
    names = [source.name.removeprefix(f"{task}-") for source, _ in parts]
    if len(set(names)) < len(names):
        names = [source.name for source, _ in parts]
    return [Questions(f"{task}.{name}", task, own, [source]) for name, (source, own) in zip(names, parts, strict=True)]
