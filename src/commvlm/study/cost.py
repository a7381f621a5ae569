"""What a grid costs before it starts: hours of every row, training as `commvlm plan` counts it, then answers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..app.answer_planning import Load, Reader, answering_hours
from ..app.planning import ASSUMED, Machine, Planner, StagePlan, Text
from ..model.cost import inspect_visual_half
from ..model.spec import build_config
from ..train.assemble import model_settings
from ..train.recipe import Model
from .runs import Places, Run


@dataclass(frozen=True)
class RowCost:
    """training, answering: hours of one run. left: runs that are not done."""

    training: float
    answering: float
    left: int


@dataclass(frozen=True)
class GridCost:
    """rows: name -> what one of its runs costs. need: bytes of one process at the stage that needs most, of the dearest row.
    on: the machine. load: of each run. kept: bytes of the models that stay, of the runs left. free: bytes of the disk."""

    rows: dict[str, RowCost]
    need: int
    on: Machine
    load: Load
    kept: int
    free: int

    @property
    def hours(self) -> float:
        """Of all runs that are not done, one after another."""
        return sum((row.training + row.answering) * row.left for row in self.rows.values())

    def table(self) -> str:
        """For people, with what is assumed."""
        lines = [f"{'row':<34}{'runs left':>10}{'hours each':>12}{'of it asked':>12}"]
        lines += [
            f"{name:<34}{row.left:>10}{row.training + row.answering:>12.2f}{row.answering:>12.2f}"
            for name, row in self.rows.items()
        ]
        left = sum(row.left for row in self.rows.values())
        where = f"{self.on.count} x {self.on.name}"
        lines.append(
            f"{left} runs, {self.hours:,.1f} hours of {where}; {self.load.questions:,} questions about {self.load.images:,} "
            "images to each run"
        )
        text = Text()
        lines.append(
            ASSUMED.format(
                efficiency=self.on.efficiency, peak=self.on.peak / 1e12, text=text.front, words=text.words,
                answer=text.answer,
            )
        )  # fmt: skip
        if self.need > self.on.memory:
            lines.append(
                f"a run needs {self.need / 1e9:.0f} GB of one {self.on.name}'s {self.on.memory / 1e9:.0f}: it cannot be "
                "trained so; more --processes hold less each where the scale's train.engine is fsdp, and `commvlm plan "
                "jobs/KEY.yaml` says what else would fit"
            )
        if self.kept:
            lines.append(
                f"the models that stay take {self.kept / 1e12:.2f} TB, the disk has {self.free / 1e12:.2f}"
                + ("; keep: false in the scale keeps their answers alone" if self.kept > self.free else "")
            )
        return "\n".join(lines)


def grid_cost(runs: Sequence[Run], places: Places, on: Machine, *, load: Load, keep: bool = False) -> GridCost:
    """Plans the dearest row of every number of visual tokens; the others differ from it by their visual halves.

    Encoders run forward once an image (not at all where features are read), what is trained of a visual half thrice. A
    run that several rows share is counted with the first of them. load: of each run. keep: whether trained models stay.
    """
    first: dict[str, Run] = {}
    left: Counter[str] = Counter()
    seen = set[str]()
    for run in runs:
        first.setdefault(run.row.name, run)
        left[run.row.name] += run.key not in seen and not places.done(run.key)
        seen.add(run.key)
    visual = {name: visual_flops(run.recipe.model) for name, run in first.items()}
    plans: dict[int, tuple[list[StagePlan], float]] = {}
    model = 0
    stepped = {
        name: flops - (encoders if first[name].recipe.train.features is not None else 0)
        for name, (_, flops, encoders) in visual.items()
    }
    for name in sorted(first, key=lambda name: -stepped[name]):
        tokens = visual[name][0]
        if tokens not in plans:
            planner = Planner(first[name].recipe, on)
            model = max(model, 4 * planner.parameters())  # saved in fp32
            plans[tokens] = [planner.plan(stage) for stage in first[name].recipe.train.stages], stepped[name]
    rows = {}
    reader = Reader.of(build_config(**model_settings(next(iter(first.values())).recipe.model)))
    for name, run in first.items():
        tokens, flops, encoders = visual[name]
        evaluate = run.recipe.evaluate
        answering = answering_hours(
            reader, load, on, tokens=tokens, visual=encoders + (flops - encoders) / 3, batch=evaluate.batch,
            half=evaluate.precision == "bf16", text=Text(),
        )  # fmt: skip
        stages, dearest = plans[tokens]
        less = dearest - stepped[name]
        images = sum(plan.stage.batch * plan.stage.steps for plan in stages)
        speed = on.count * on.peak * on.efficiency
        training = sum(plan.hours for plan in stages) - less * images / speed / 3600
        rows[name] = RowCost(training, answering, left[name])
    need = max(plan.memory.total for stages, _ in plans.values() for plan in stages)
    return GridCost(rows, need, on, load, keep * model * sum(left.values()), free_bytes(places.root))


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder lies on, or will."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def visual_flops(model: Model) -> tuple[int, float, float]:
    """(visual tokens; FLOPs of an image in a training step, of the visual half alone; of these, its encoders')."""
    config = build_config(**model_settings(model))
    flops: Counter[str] = Counter()
    for part in inspect_visual_half(config):
        flops[part.part] += part.flops
    trained = flops["merge"] + flops["align"] + flops["project"]
    return config.num_image_tokens, flops["encoders"] + 3 * trained, flops["encoders"]
