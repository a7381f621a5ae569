"""What a stage trains: its `trains` is the only statement of it, told, checked and kept in run.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..model.modeling import CommForConditionalGeneration
from .keys import RecipeError, nearest_key

TRAINABLE = ("merge", "align", "project", "language_model")


def check_trained(trains: Mapping[str, float]) -> None:
    """Raises RecipeError for a part that there is not, naming the nearest one, and for a rate that is none."""
    for part, rate in trains.items():
        if part not in TRAINABLE:
            raise RecipeError(f"trains names no part {part!r}{nearest_key(part, TRAINABLE)}")
        if not (math.isfinite(rate) and rate >= 0):
            raise RecipeError(f"trains gives part {part!r} the rate {rate}; it must be a number from 0")


def settle_parts(model: CommForConditionalGeneration, trains: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Freezes what a stage does not name, and says so: part -> {parameters, trained, lr}.

    The only place that decides what is trained. Raises RecipeError for a part that there is not, and when nothing is left
    to train.
    """
    check_trained(trains)
    report = {}
    for part, module in model.parts().items():
        rate = trains.get(part)
        module.requires_grad_(rate is not None)
        parameters = list(module.parameters())
        total = sum(p.numel() for p in parameters)
        report[part] = {"parameters": total, "trained": total if rate is not None else 0, "lr": rate}
    if not any(row["trained"] for row in report.values()):
        raise RecipeError("nothing is trained: name at least one part with parameters and its rate in trains")
    return report


def parts_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """What is trained and what is frozen, for people."""
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}{'rate':>12}"]
    for part, row in report.items():
        rate = "frozen" if row["lr"] is None else f"{row['lr']:.1e}"
        lines.append(f"{part:<16}{row['parameters']:>16,}{row['trained']:>16,}{rate:>12}")
    return "\n".join(lines)
