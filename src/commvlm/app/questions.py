"""What a recipe asks: sets of questions, each of one task, asked and scored together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    Files of other tasks and sets need not be there. Raises ValueError for a task that there is not, or that the recipe does
    not ask, and for a rule that its task has not.
    """
    for name in tasks:
        task_named(name.split(".")[0])
    for name, rule in recipe.evaluate.rules.items():
        task_named(name).rule_named(rule)
    if not recipe.evaluate.sources:
        raise ValueError("the recipe asks nothing: name what is asked in evaluate.sources")
    told = {s.name: task for s in recipe.evaluate.sources if (task := task_of(s.format, s.options)) in TASKS}
    others = {name: said for name, task in told.items() if tasks and (said := _unasked(name, task, told, tasks))}
    sources = [source for source in recipe.evaluate.sources if source.name not in others]
    read = named_examples(sources, Path(recipe.data.root))
    asked: dict[str, list[tuple[Source, list[Example]]]] = {}
    for source in sources:
        for task in dict.fromkeys(task_named(example.task).name for example in read[source.name]):
            own = [example for example in read[source.name] if example.task == task]
            asked.setdefault(task, []).append((source, own))
    sets = [one for task, parts in asked.items() for one in _sets(task, parts, _names(task, told, parts))]
    for name in tasks:
        if not any(name in (one.name, one.task) for one in sets):
            there = ", ".join(sorted({*(one.name for one in sets), *others.values()}))
            raise ValueError(f"the recipe asks nothing of {name!r}; it asks {there}")
    return [one for one in sets if not tasks or one.name in tasks or one.task in tasks]


def _unasked(name: str, task: str, told: Mapping[str, str], tasks: Sequence[str]) -> str:
    """What a source that need not be read is of: its task, or its set where another set of the task is wanted. Nothing of one
    that is wanted."""
    if task in tasks:
        return ""
    if task not in {wanted.split(".")[0] for wanted in tasks}:
        return task
    own = _names(task, told, [])[name]
    return "" if own in tasks or own == task else own


def _names(task: str, told: Mapping[str, str], parts: Sequence[tuple[Source, list[Example]]]) -> dict[str, str]:
    """Source -> its set's name, over all sources of a task, those too that are not read."""
    sources = dict.fromkeys([*(name for name, of in told.items() if of == task), *(source.name for source, _ in parts)])
    if len(sources) == 1 or task_named(task).whole:
        return dict.fromkeys(sources, task)
    short = {name: name.removeprefix(f"{task}-") for name in sources}
    alike = len(set(short.values())) < len(short)
    return {name: f"{task}.{name if alike else short[name]}" for name in sources}


def _sets(task: str, parts: Sequence[tuple[Source, list[Example]]], names: Mapping[str, str]) -> list[Questions]:
    if task in names.values():
        every = [example for _, own in parts for example in own]
        return [Questions(task, task, every, [source for source, _ in parts])]
    return [Questions(names[source.name], task, own, [source]) for source, own in parts]
