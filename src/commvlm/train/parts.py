"""What a stage trains: its `trains` is the only statement of it, told, checked and kept in run.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..model.modeling import CommForConditionalGeneration
from .keys import RecipeError, nearest_key
from .recipe import Lora

TRAINABLE = ("merge", "align", "project", "language_model")
ADAPTED = ("language_model", "encoders")
"""Parts that may have adapters."""
ADAPTER = ".lora_"
"""In the names of an adapter's weights."""
WITHOUT = Lora()


def check_trained(trains: Mapping[str, float], lora: Lora = WITHOUT) -> None:
    """Raises RecipeError for a part that there is not, naming the nearest one, for a rate that is none, and for adapters that
    nothing trains."""
    adapted = lora.parts if lora.rank else []
    for part in adapted:
        if part not in ADAPTED:
            raise RecipeError(f"lora.parts names no part {part!r}{nearest_key(part, ADAPTED)}")
        if part not in trains:
            raise RecipeError(f"lora.parts names {part!r}, but trains does not: give it a rate there")
    if adapted and (lora.rank < 0 or not 0 <= lora.dropout < 1 or not lora.alpha > 0):
        raise RecipeError("lora needs a rank from 1, an alpha over 0 and a dropout from 0 to below 1")
    for part, rate in trains.items():
        if part == "encoders" and part not in adapted:
            raise RecipeError(
                "trains names encoders, which are trained through lora only: name them in lora.parts, too"
            )
        if part not in (*TRAINABLE, *adapted):
            raise RecipeError(f"trains names no part {part!r}{nearest_key(part, TRAINABLE)}")
        if not (math.isfinite(rate) and rate >= 0):
            raise RecipeError(f"trains gives part {part!r} the rate {rate}; it must be a number from 0")


def settle_parts(
    model: CommForConditionalGeneration, trains: Mapping[str, float], lora: Lora = WITHOUT
) -> dict[str, dict[str, Any]]:
    """Freezes what a stage does not name, and says so: part -> {parameters, trained, lr}, and lora: its rank, where the
    model has adapters (`adapters.Adapters`) in that part.

    The only place that decides what is trained. Raises RecipeError for a part that there is not, and when nothing is left
    to train.
    """
    check_trained(trains, lora)
    report = {}
    for part, module in model.parts().items():
        rate, adapted = trains.get(part), lora.rank > 0 and part in lora.parts
        total = trained = 0
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point():  # weights of 4 bits are not, and cannot be asked
                parameter.requires_grad_(rate is not None and (not adapted or ADAPTER in name))
            total += parameter.numel()
            trained += parameter.numel() if parameter.requires_grad else 0
        report[part] = {"parameters": total, "trained": trained, "lr": rate} | ({"lora": lora.rank} if adapted else {})
    if not any(row["trained"] for row in report.values()):
        raise RecipeError("nothing is trained: name at least one part with parameters and its rate in trains")
    return report


def parts_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """What is trained and what is frozen, for people."""
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}{'rate':>12}"]
    for part, row in report.items():
        rate = "frozen" if row["lr"] is None else f"{row['lr']:.1e}"
        lora = f"  lora, rank {row['lora']}" if "lora" in row else ""
        lines.append(f"{part:<16}{row['parameters']:>16,}{row['trained']:>16,}{rate:>12}{lora}")
    return "\n".join(lines)
