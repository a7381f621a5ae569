"""The tiny checkpoints' cards, as the report shows them: how each was made, and what it knows beside its random twin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

PARTS = {"clip": "CLIP", "dinov2": "DINOv2", "lm": "language model"}
MADE = ("objective", "difficulty", "views", "updates", "batch", "seconds", "seed")
TWIN = "random_twin"


@dataclass(frozen=True)
class Card:
    """made: how. scores: (metric, trained, random twin). beats_twin: what the card says of it, None if nothing."""

    title: str
    made: tuple[tuple[str, str], ...]
    scores: tuple[tuple[str, str, str], ...]
    beats_twin: bool | None


def shipped_parts() -> Path:
    """The folder of the shipped checkpoints."""
    return Path(str(resources.files("commvlm") / "microworld" / "weights"))


def read_cards(folder: Path) -> list[Card]:
    """The cards in FOLDER/{clip, dinov2, lm}/card.json, of those parts that have one. Raises ValueError for a broken
    one."""
    cards = []
    for name, title in PARTS.items():
        path = folder / name / "card.json"
        if path.exists():
            cards.append(_card(title, path))
    return cards


def _card(title: str, path: Path) -> Card:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error.msg}); write it again with `commvlm microworld card`") from error
    beats = content.get("beats_twin")
    return Card(
        title,
        tuple((key, _text(content[key])) for key in MADE if key in content),
        _scores(content),
        beats if isinstance(beats, bool) else None,
    )


def _scores(content: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """An encoder's card has best.{trained, random_twin}, the language model's symbolic and random_twin."""
    best = content.get("best", {})
    trained, twin = best.get("trained"), best.get(TWIN)
    if trained is None:
        trained, twin = content.get("symbolic", {}), content.get(TWIN)
    twin = twin or {}
    return tuple(
        (metric.replace("_", " "), _text(value), _text(twin.get(metric, "–"))) for metric, value in trained.items()
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
