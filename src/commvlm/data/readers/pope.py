"""POPE: JSON lines (whatever the file's ending) {"question_id", "image", "text", "label": "yes" | "no"}.

The 2023 files ask about "the imange" in every "an" question, a slip of the generator. The text is kept as it was asked,
since published figures were measured on it.
"""

from __future__ import annotations

from pathlib import Path

from ..example import Example, Turn
from .entry import Entry, Read, made
from .files import image_folder, read_lines


def read_pope(*, images: Path, questions: Path, set_name: str | None = None) -> Read:
    """One example a line. set_name: random, popular or adversarial, kept as facts["set"], by which POPE is scored."""
    folder = image_folder(images)
    yield from made(read_lines(questions), lambda entry: _example(entry, folder, set_name))


def _example(entry: Entry, folder: Path, set_name: str | None) -> Example:
    text, label = entry.plain("text"), entry.text("label").strip().lower()
    if label not in ("yes", "no"):
        raise entry.error(f"has label {label!r}, it must be yes or no")
    facts: dict[str, str | int | float] = {"question_id": entry.key("question_id")}
    if set_name is not None:
        facts["set"] = set_name
    # The generator's slip reached the field's name too in copies of the old files.
    name = entry.text("imange" if entry.has("imange") and not entry.has("image") else "image")
    return Example(entry.id, "pope", entry.image(folder, name), (Turn(text, label),), references=(label,), facts=facts)
