"""What the paper claims, and what its reviewers asked, as differences of rows; worded by their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..evaluate.tasks.rec import MEAN_IOU
from ..model.checkpoints import find_checkpoint
from ..train.assemble import located
from . import controls as c
from .experiments import TABLE_7, aligned
from .rows import comm, is_dino, layers_for, merged_name, mfm, pair, single_name
from .settings import Scale, StudyEncoder
from .statistics import Estimate, difference, holm, seeds_of, usual_variance

Expect = Literal["more", "less", "level"]
LEVEL = 2.0
"""Points within which two rows count as level, when the whole interval lies there."""
REC_IOU = f"rec {MEAN_IOU}"
"""Tallied beside REC, as one that has room where acc@0.5 has none left."""
F = {
    "F1": "The best CLIP layer depends on the task",
    "F2": "The vision-only encoder needs only an MLP; then its deep layers ground better than CLIP's",
    "F3": "Merging all levels beats one level; LLN-Layerscale merges best; shallow levels help CLIP and hurt the other",
    "F4": "MAE: fair at REC, weak at POPE and REG; DeiT: weak everywhere, worst at REC",
    "F5": "Both encoders, both merged (COMM), are best overall",
    "E": "Encoders that the paper has not: at their deepest layer of Table 7, beside one deep layer of the pair's",
    "C": "Controls: what else could explain it",
}
"""Findings of the paper (F1-F5), in short, and what is held against them."""
COMMANDS = {
    "F1": "figure-2", "F2": "table-1 table-6 controls", "F3": "table-1 figure-3", "F4": "table-7", "F5": "table-1",
    "E": "table-7 table-1",
    "C": "controls table-1 figure-2",
}  # fmt: skip
"""Finding -> the experiments that have its rows."""


def is_reading(task: str) -> bool:
    """Whether it is another figure of the same answers, as REC's overlap is."""
    return " " in task


def title_of(finding: str, scale: Scale) -> str:
    """A finding in short, and which encoder stands for the paper's DINOv2 where it is another one."""
    _, second = pair(scale)
    stands = finding in ("F2", "F3", "F5") and not is_dino(find_checkpoint(located(second.checkpoint)).config)
    return F[finding] + (f" (here {second.name} stands in DINOv2's place)" if stands else "")


@dataclass(frozen=True)
class Claim:
    """says: in words. terms: row -> its part of the difference. expect: which way the paper has it (a control: which way it
    must be for the paper's reading to stand)."""

    finding: str
    says: str
    task: str
    terms: Mapping[str, float]
    expect: Expect = "more"


@dataclass(frozen=True)
class Verdict:
    """estimate: of the difference, in points. word: "holds", "reversed" or "undecided". adjusted: Holm's p among all claims
    that can be decided, None for others. seeds: how many its rows have in common; with one, whose interval knows nothing of
    others, nothing is decided. floor: whether none of its rows is above the blind one; then nothing is decided either."""

    claim: Claim
    estimate: Estimate
    word: str
    adjusted: float | None
    seeds: int
    floor: bool = False

    @property
    def why(self) -> str:
        """Why nothing is decided whatever the interval, or nothing."""
        return "one seed" if self.seeds == 1 else "none shown above the blind row" if self.floor else ""


def word(estimate: Estimate, expect: Expect) -> str:
    """What the interval allows to be said of a claim.

    "more": holds when it lies above zero, reversed below. "less" the other way. "level": holds when it lies within `LEVEL`
    points of zero, reversed when it lies wholly outside.
    """
    low, high = estimate.low, estimate.high
    if expect == "level":
        return "holds" if low > -LEVEL and high < LEVEL else "reversed" if low > LEVEL or high < -LEVEL else "undecided"
    if expect == "less":
        low, high = -high, -low
    return "holds" if low > 0 else "reversed" if high < 0 else "undecided"


def judged(claims: Sequence[Claim], estimates: Mapping[str, Mapping[str, Estimate]]) -> list[Verdict]:
    """estimates: task -> row -> estimate. Claims whose rows were not all run, with one seed in common, are left out."""
    usual = {task: usual_variance(rows) for task, rows in estimates.items()}
    found, seeds, floor = {}, {}, {}
    for k, claim in enumerate(claims):
        rows = estimates.get(claim.task, {})
        if all(name in rows for name in claim.terms) and seeds_of(rows, claim.terms):
            found[k] = difference(rows, claim.terms, usual=usual[claim.task])
            seeds[k] = len(found[k].seeds)
            floor[k] = not _sees(claim, rows, usual[claim.task])
    open_ = [k for k in found if not floor[k] and seeds[k] > 1]
    adjusted = holm({str(k): p_of(found[k], claims[k].expect) for k in open_})
    verdicts = []
    for k, estimate in found.items():
        said = word(estimate, claims[k].expect) if k in open_ else "undecided"
        verdicts.append(Verdict(claims[k], estimate, said, adjusted.get(str(k)), seeds[k], floor[k]))
    return verdicts


def p_of(estimate: Estimate, expect: Expect) -> float:
    """Two-sided, that the difference is zero. For "level", two-sided too: that it is `LEVEL` or more away, or that it is not,
    whichever is less. Under 0.05 just where the interval decides."""
    if expect != "level":
        return estimate.p
    outside = max(estimate.below(-LEVEL), 1 - estimate.below(LEVEL))
    return min(1.0, 2 * outside, 2 * (1 - outside))


def _sees(claim: Claim, rows: Mapping[str, Estimate], usual: float) -> bool:
    """Whether any of the claim's rows is above the blind one: rows that all answer without looking are level for no reason
    that the claim is about. Without a blind row nothing is known, and nothing is held back."""
    if c.BLIND not in rows or c.BLIND in claim.terms:
        return True
    return any(_above_blind(name, rows, usual) for name in claim.terms)


def _above_blind(name: str, rows: Mapping[str, Estimate], usual: float) -> bool:
    """Whether a row's interval lies above the blind row; above its mean, where they have no seed in common."""
    if not seeds_of(rows, (name, c.BLIND)):
        return rows[name].low > rows[c.BLIND].mean
    return difference(rows, {name: 1.0, c.BLIND: -1.0}, usual=usual).low > 0


def claims_of(scale: Scale) -> list[Claim]:
    """Every claim that the scale's rows can speak to, on each of its sets of a task where it scores sets."""
    first, second = pair(scale)
    found: list[Claim] = []
    for make in (_layers, _alignment, _merges, _objectives, _joined, _others, _controls):
        found += make(scale, first, second)
    absent = _left_out(scale, first, second)
    return [
        one
        for claim in found
        if absent.isdisjoint(claim.terms)
        for task in scale.tasks
        if task.split(".")[0] == claim.task
        for one in _readings(replace(claim, task=task))
    ]


def _left_out(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> set[str]:
    """Rows of controls that the scale does not run."""
    mlps = {c.with_mlp(scale, first).name, c.without_mlp(scale, second).name}
    every = mlps | {c.NO_MERGE, c.RANDOM_TWIN, c.TWICE, c.LARGER, c.CAPACITY, c.SHUFFLED, c.BLIND}
    if scale.controls is not None:
        return every - set(scale.controls)
    sizes = {c.LARGER: scale.larger_image, c.CAPACITY: scale.capacity}
    return {name for name, given in sizes.items() if given is None}


def _readings(claim: Claim) -> list[Claim]:
    """A claim about REC is one about both of its figures."""
    rec = claim.task.split(".")[0] == "rec"
    return [claim, replace(claim, task=f"{claim.task} {MEAN_IOU}")] if rec else [claim]


def _against(
    finding: str, says: str, tasks: Sequence[str], plus: str, minus: str, expect: Expect = "more"
) -> list[Claim]:
    return [Claim(finding, says, task, {plus: 1.0, minus: -1.0}, expect) for task in tasks if plus != minus]


def _layers(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> list[Claim]:
    """F1, on layers chosen beforehand: the middle, seven tenths, the last of the sweep. A peak chosen from the data would
    flatter itself."""
    top, middle, late = (_at(scale, share) for share in (1, 0.5, 0.7))
    name: Callable[[int], str] = lambda layer: single_name(first, layer)  # noqa: E731
    return [
        *_against("F1", f"{first.name}: layer {middle} above layer {top}", ["rec"], name(middle), name(top)),
        *_against("F1", f"{first.name}: layer {top} above layer {middle}", ["pope"], name(top), name(middle)),
        *_against("F1", f"{first.name}: layer {late} above layer {top}", ["reg"], name(late), name(top)),
    ]


def _at(scale: Scale, share: float) -> int:
    """The layer of the sweep that is nearest to this share of its deepest."""
    return min(scale.layers, key=lambda layer: abs(layer - share * max(scale.layers)))


def _alignment(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> list[Claim]:
    last = [single_name(given, given.last) for given in (first, second)]
    linear, mlp = f"{last[1]}, linear", f"{last[0]} + MLP"
    deep = second.one_layer
    each = f"{deep} each" if deep == first.one_layer else f"{deep} against {first.one_layer}"
    gain = {last[1]: 1.0, linear: -1.0, mlp: -1.0, last[0]: 1.0}
    merged = [mfm(scale, given).name for given in (first, second)]
    deepest = aligned(scale, second, max(scale.depths), 4).name
    return [
        *_against("F2", f"{second.name}: MLP above linear alignment, {deep}", ["rec", "pope"], last[1], linear),
        Claim("F2", f"the MLP gives {second.name} more than it gives {first.name}", "rec", gain),
        *_against("F2", f"{second.name} above {first.name}, {each}", ["rec"], last[1], last[0]),
        *_against("F2", f"{second.name} below {first.name}, {each}", ["pope"], last[1], last[0], "less"),
        *_against("F2", f"{second.name} level with {first.name}, both merged", ["pope"], merged[1], merged[0], "level"),
        *_against(
            "F2",
            f"an MLP of {max(scale.depths)} hidden layers below the scale's own alignment",
            ["rec", "pope"],
            deepest,
            merged[1],
            "less",
        ),
    ]


def _merges(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> list[Claim]:
    found = []
    for given in (first, second):
        best = merged_name(given, "lln-layerscale", "all")
        last = single_name(given, given.last)
        found += _against(
            "F3", f"{given.name}: all levels merged above its {given.one_layer}", ["rec", "pope"], best, last
        )
        for merge in ("mean", "layerscale", "conv-layerscale"):
            says = f"{given.name}: LLN-Layerscale above {merge}, all layers"
            found += _against("F3", says, ["rec", "pope"], best, merged_name(given, merge, "all"))
    means = [[merged_name(given, "mean", layers) for layers in ("all", given.deep)] for given in (first, second)]
    says = f"{first.name}: Mean(all) above Mean({first.deep}): shallow levels help"
    found += _against("F3", says, ["rec"], means[0][0], means[0][1])
    says = f"{second.name}: Mean(all) below Mean({second.deep})"
    return found + _against("F3", says, ["rec", "pope"], means[1][0], means[1][1], "less")


def _objectives(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> list[Claim]:
    mae, deit = (_deepest(scale, given) for given in TABLE_7)
    found = []
    if mae:
        found += _against(
            "F4", f"{mae} below {first.name} merged", ["pope", "reg"], mae, mfm(scale, first).name, "less"
        )
    if mae and deit:
        found += _against("F4", f"{deit} below {mae}", ["rec"], deit, mae, "less")
    if deit:
        best = [mfm(scale, given) for given in (first, second)]
        for row in best:
            found += _against("F4", f"{deit} below {row.name}", ["rec", "pope", "reg"], deit, row.name, "less")
    return found


def _deepest(scale: Scale, name: str) -> str:
    """An encoder's row at its deepest layer of Table 7. Nothing of one that the scale has not."""
    given = next((one for one in scale.encoders if one.name == name), None)
    return "" if given is None else single_name(given, layers_for(scale, given, scale.deepest)[-1])


def _others(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> list[Claim]:
    tasks = list(dict.fromkeys(task.split(".")[0] for task in scale.tasks))
    added = [one.name for one in scale.encoders if one.name not in (*scale.pair, *TABLE_7)]
    return [
        claim
        for row in (_deepest(scale, name) for name in added)
        for given in (first, second)
        for claim in _against(
            "E", f"{row} above {given.name}'s {given.one_layer}", tasks, row, single_name(given, given.last)
        )
    ]


def _joined(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> list[Claim]:
    found, tasks = [], list(dict.fromkeys(task.split(".")[0] for task in scale.tasks))
    for given in (first, second):
        alone = mfm(scale, given).name
        found += _against("F5", f"COMM above {given.name} merged alone", tasks, comm(scale).name, alone)
    return found


def _controls(scale: Scale, first: StudyEncoder, second: StudyEncoder) -> list[Claim]:
    whole = comm(scale).name
    tasks = ["rec", "pope", "vqa"]
    lasts = [single_name(given, given.last) for given in (first, second)]
    middle = _at(scale, 0.5)
    single = f"{first.name}: all levels merged above its layer {middle} alone"
    found = [
        *_against("C", single, tasks, mfm(scale, first).name, single_name(first, middle)),
        *_against("C", "fusion without merging above the first encoder alone", tasks, c.NO_MERGE, lasts[0]),
        *_against("C", "fusion without merging above the second encoder alone", tasks, c.NO_MERGE, lasts[1]),
        *_against("C", "merging adds to fusion", tasks, whole, c.NO_MERGE),
        *_against("C", "a trained second encoder above a random one", tasks, whole, c.RANDOM_TWIN),
        *_against("C", "a second encoder above the first one again (equal parameters)", tasks, whole, c.TWICE),
        *_against("C", "a second encoder above a larger image (equal FLOPs)", tasks, whole, c.LARGER),
        *_against("C", "a second encoder above one encoder of the pair's size", tasks, whole, c.CAPACITY),
        *_against("C", "COMM above itself with shuffled images", tasks, whole, c.SHUFFLED),
        *_against("C", "COMM above itself without images", tasks, whole, c.BLIND),
    ]
    return found
