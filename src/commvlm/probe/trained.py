"""What trained models scored, from a list of one's own or from a study's results.json, by the names that a probe uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK_OF = {"rec": "rec", "pope": "presence", "reg": "region"}
"""A study's task -> the probe's that stands for it."""
PLACE_OF = {"mean half": "mean(half)", "mean all": "mean(all)", "lln-layerscale all": "lln-layerscale(all)"}
"""A study's words for a row's merge and layers -> the probe's place."""


@dataclass(frozen=True)
class Trained:
    """What a trained model scored. encoder, place: as in the probe (a layer's number as text, or a merge's name). scores
    (S,): of each training seed, as shares. error: standard error of their mean over test images, 0 where it is not known."""

    encoder: str
    place: str
    scores: tuple[float, ...]
    error: float = 0.0


def read_trained(path: Path, depths: Mapping[str, int]) -> dict[str, list[Trained]]:
    """Task -> trained models, from [{"task", "encoder", "place", "scores": [...], "error"?}], or from the results.json of
    `commvlm study`. depths: encoder -> its blocks. Raises ValueError with the entry's number."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is no JSON file ({error})") from error
    if isinstance(content, dict) and isinstance(content.get("rows"), dict):
        return _of_study(content["rows"], depths)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: must be a list of trained models, or a study's results.json")
    found: dict[str, list[Trained]] = {}
    for number, row in enumerate(content, 1):
        try:
            scores = tuple(float(score) for score in row["scores"])
            entry = Trained(str(row["encoder"]), str(row["place"]), scores, float(row.get("error", 0.0)))
            found.setdefault(str(row["task"]), []).append(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: entry {number} needs task, encoder, place and scores ({error!r})") from error
        if not scores or not all(0 <= score <= 1 for score in scores):
            raise ValueError(f"{path}: entry {number} has scores {list(scores)}; give shares from 0 to 1")
    return found


def _of_study(rows: Mapping[str, Any], depths: Mapping[str, int]) -> dict[str, list[Trained]]:
    """Rows of one encoder with one layer, or with a merge that the probe reads, each once ("clip last" is "clip 8" again);
    percent, as [mean, low, high]."""
    found: dict[str, list[Trained]] = {}
    seen = set[tuple[str, str]]()
    for name, row in rows.items():
        encoder, _, rest = name.partition(" ")
        place = PLACE_OF.get(rest, rest)
        if rest == "last" and encoder in depths:
            place = str(depths[encoder])
        if encoder not in depths or not (place.isdigit() or rest in PLACE_OF) or (encoder, place) in seen:
            continue
        seen.add((encoder, place))
        for task, known in TASK_OF.items():
            if task in row:
                mean, low, high = row[task]
                entry = Trained(encoder, place, (mean / 100,), (high - low) / 2 / 1.96 / 100)
                found.setdefault(known, []).append(entry)
    return found
