"""What a result says, held against its form, so that one from elsewhere cannot break a report."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .tallies import Tally

KEY = re.compile(r"[0-9a-f]{16}")
IMAGES = 100_000
"""Of a task at most: the bootstrap draws from them all at once."""
FACTS: dict[str, type] = {
    "name": str, "key": str, "seconds": dict, "scores": dict, "tallies": dict, "layer_weights": dict, "losses": list,
    "alignments": dict, "versions": dict,
}  # fmt: skip
"""What every result says, see `worker.work`; with `from`, where it was taken from a file."""
SCORE: dict[str, tuple[type, ...]] = {
    "metric": (str,), "rule": (str,), "value": (int, float), "n": (int,), "unparsable": (int,),
}  # fmt: skip
ENCODER = re.compile(r"[\w+. -]{1,80}")
"""How an encoder may be called: charts draw what is between dollar signs as mathematics."""
FIGURE = re.compile(r"[\w-]{1,40}(\.[\w.+-]{1,60})?( [\w-]{1,40})?")
"""A task, a set of one, or a reading of either."""
TOP = {"caption": 10, "reg": 10}
"""The highest mark of one question where it is not 1: CIDEr's."""
ROUNDED = 1e-5
"""By how much a sum of marks may be too high, having been rounded."""
AGREE = 0.01
"""Points by which a tally and the score of its name may differ."""
ALIGNMENT = {"gradient_norm", "spread", "rank"}


def checked(text: str, where: str) -> dict[str, Any]:
    """A result. Raises ValueError with the place for one that lacks something, or has it in another form."""
    try:
        result = json.loads(text)
        json.dumps(result, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON of finite numbers and whole characters") from error
    if not isinstance(result, dict):
        raise ValueError(f"{where}: a result is an object")
    for name, kind in FACTS.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}")
    if not KEY.fullmatch(result["key"]):
        raise ValueError(f"{where}: key {result['key'][:40]!r} is none of a run")
    fault = _fault(result)
    if fault:
        raise ValueError(f"{where}: {fault}")
    return result


def same_questions(result: Mapping[str, Any], other: Mapping[str, Any], tasks: Collection[str], where: str) -> None:
    """Raises ValueError where a checked result is not about these tasks, or about other images or questions than `other`."""
    if set(result["scores"]) != set(tasks):
        raise ValueError(f"{where}: its tasks are {', '.join(map(_short, result['scores']))}, not {', '.join(tasks)}")
    names, wanted = set(result["tallies"]), set(other["tallies"])
    if names != wanted or not names >= set(tasks):
        raise ValueError(
            f"{where}: its tallies are {', '.join(map(_short, sorted(names)))}, not {', '.join(sorted(wanted))}"
        )
    for task, said in result["tallies"].items():
        if any(said[part] != other["tallies"][task][part] for part in ("images", "groups", "counts")):
            raise ValueError(f"{where}: tallies.{task} is about other images or questions than results before it")


def _fault(result: Mapping[str, Any]) -> str:
    seconds, weights = result["seconds"], result["layer_weights"]
    if set(seconds) != {"train", "evaluate"} or not all(map(_number, seconds.values())):
        return "seconds must be numbers, of train and evaluate"
    odd = next((name for name in [*result["scores"], *result["tallies"]] if not FIGURE.fullmatch(name)), None)
    if odd is not None:
        return f"'{_short(odd)}' is no task, set of one or reading of it"
    for task, said in result["scores"].items():
        if not (isinstance(said, dict) and all(type(said.get(name)) in kinds for name, kinds in SCORE.items())):
            return f"scores.{_short(task)} must say {', '.join(SCORE)}"
        if not _number(said["value"]):
            return f"scores.{_short(task)}.value must be a number"
    for task, said in result["tallies"].items():
        if not _is_tally(said):
            return f"tallies.{_short(task)} must have sums and counts of every image and group"
        top = TOP.get(re.split(r"[. ]", task)[0], 1)
        tally = Tally.from_json(said)
        if (tally.counts % 1).any() or (tally.sums < 0).any() or (tally.sums > top * tally.counts + ROUNDED).any():
            return f"tallies.{_short(task)} must have whole counts, and sums of marks from 0 to {top}"
        score = result["scores"].get(task, {"value": tally.value()})["value"]
        if abs(tally.value() - score) > AGREE:
            return f"tallies.{_short(task)} is {tally.value():.2f} and must be scores.{_short(task)}.value, {score:.2f}"
    for row in result["losses"]:
        whole = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)
        if not (whole and all(map(_number, row[1:]))):
            return f"losses are [stage, step, loss] each, one is {str(row)[:40]!r}"
    for name, own in weights.items():
        if not ENCODER.fullmatch(name):
            return f"layer_weights names an encoder {_short(name)!r}: letters, digits, blanks and + - _ . alone"
        if not (isinstance(own, dict) and all(layer.isdecimal() and _number(w) for layer, w in own.items())):
            return f"layer_weights.{_short(name)} must be numbers by layer"
    for name, own in result["alignments"].items():
        if not (isinstance(own, dict) and set(own) == {"start", "end"} and all(map(_is_alignment, own.values()))):
            return f"alignments.{_short(name)} must say {', '.join(sorted(ALIGNMENT))} of each layer, at start and end"
    if not all(isinstance(said, str) for said in [result.get("from", ""), *result["versions"].values()]):
        return "from and versions must be texts"
    return ""


def _is_tally(said: Any) -> bool:
    if not isinstance(said, dict) or set(said) != {"images", "groups", "sums", "counts"}:
        return False
    images, groups = said["images"], said["groups"]
    if not (
        isinstance(images, list) and isinstance(groups, list) and 0 < len(images) <= IMAGES and 0 < len(groups) <= 16
    ):
        return False
    if not all(isinstance(name, str) for name in [*images, *groups]):
        return False
    for table in (said["sums"], said["counts"]):
        if not (isinstance(table, list) and all(isinstance(row, list) and all(map(_number, row)) for row in table)):
            return False
        if [len(row) for row in table] != [len(groups)] * len(images):
            return False
    return bool((np.asarray(said["counts"]) >= 0).all() and (np.asarray(said["counts"]).sum(0) > 0).all())


def _is_alignment(layers: Any) -> bool:
    return isinstance(layers, list) and all(
        isinstance(facts, dict) and set(facts) == ALIGNMENT and all(map(_number, facts.values())) for facts in layers
    )


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15


def _short(name: str) -> str:
    return ascii(name[:40])[1:-1]
