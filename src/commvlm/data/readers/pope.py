"""POPE: JSON lines (whatever the file's ending) {"question_id", "image", "text", "label": "yes" | "no"}.

The 2023 files ask about "the imange" in every "an" question, a slip of the generator. The text is kept as it was asked,
since published figures were measured on it.
"""

from __future__ import annotations

from pathlib import Path

from ..example import BOXES, Example, Turn
from .files import Entry, image_folder, read_lines


def read_pope(*, images: Path, questions: Path, set_name: str | None = None) -> list[Example]:
    """One example a line. set_name: random, popular or adversarial, kept as facts["set"], by which POPE is scored.

    Raises ValueError naming the file and the line.
    """
    folder = image_folder(images)
    return [_example(entry, f"{questions.stem}:{number}", folder, set_name) for number, entry in read_lines(questions)]


def _example(entry: Entry, id: str, folder: Path, set_name: str | None) -> Example:
    text, label = entry.text("text"), entry.text("label").strip().lower()
    if label not in ("yes", "no"):
        raise entry.error(f"has label {label!r}, it must be yes or no")
    if BOXES in text:
        raise entry.error(f"has {BOXES} in its text, which is reserved")
    facts: dict[str, str | int | float] = {"question_id": entry.key("question_id")}
    if set_name is not None:
        facts["set"] = set_name
    # The generator's slip reached the field's name too in copies of the old files.
    name = entry.text("imange" if entry.has("imange") and not entry.has("image") else "image")
    return Example(id, "pope", entry.image(folder, name), (Turn(text, label),), references=(label,), facts=facts)
