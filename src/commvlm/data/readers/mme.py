"""MME: a folder a subtask, two yes/no questions an image, in a text file of the image's name.

artwork/{images/0.jpg, questions_answers_YN/0.txt}     artwork, celebrity, landmark, posters, scene
color/{000000006040.jpg, 000000006040.txt}             the others

A line is question<TAB>Yes or No. The question is asked as it stands, its "Please answer yes or no." included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..example import RESERVED, Example, Turn
from .entry import EntryError, Read
from .files import image_folder, read_rows

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)
PICTURES = (".jpg", ".jpeg", ".png")


def read_mme(*, images: Path, subtasks: list[str] | None = None) -> Read:
    """One example a question, the two of an image one after the other, images by name.

    images: the benchmark's folder. subtasks: which ones; all that are there by default. The answer is "Yes" or "No" as in
    the file; facts: subtask, image_name (the file's, as MME's results name it), question_number (0 or 1).
    """
    folder = image_folder(images)
    wanted = [name for name in SUBTASKS if (folder / name).is_dir()] if subtasks is None else list(subtasks)
    for name in wanted:
        if name not in SUBTASKS:
            raise ValueError(f"mme: there is no subtask {name!r}; subtasks: {', '.join(SUBTASKS)}")
        if not (folder / name).is_dir():
            raise ValueError(f"mme: {folder} has no folder {name}")
    if not wanted:
        raise ValueError(f"mme: {folder} has no folder of a subtask, such as {SUBTASKS[0]}; it is the release's folder")
    for name in wanted:
        yield from _subtask(folder / name)


def _subtask(folder: Path) -> Read:
    apart = (folder / "questions_answers_YN").is_dir()
    asked = folder / "questions_answers_YN" if apart else folder
    shown = folder / "images" if apart else folder
    files = sorted(asked.glob("*.txt"))
    if not files:
        raise ValueError(f"mme: {asked} has no questions (*.txt)")
    for path in files:
        image = next((shown / f"{path.stem}{end}" for end in PICTURES if (shown / f"{path.stem}{end}").is_file()), None)
        if image is None:
            yield EntryError(f"{folder.name}/{path.name}", f"has no image {path.stem}{PICTURES[0]} or .png in {shown}")
            continue
        yield from _questions(path, image, folder.name)


def _questions(path: Path, image: Path, subtask: str) -> Iterator[Example | EntryError]:
    try:
        rows = read_rows(path)
    except ValueError as error:
        yield EntryError(f"{subtask}/{path.name}", f"cannot be read ({error})")
        return
    if len(rows) != 2:
        yield EntryError(f"{subtask}/{path.name}", f"has {len(rows)} questions, an image has two")
        return
    for number, row in enumerate(rows):
        where = f"{subtask}/{path.name}:{number + 1}:"
        question, tab, answer = row.rpartition("\t")
        if not tab or answer.strip() not in ("Yes", "No") or any(slot in question for slot in RESERVED):
            yield EntryError(where, f"is {row[:60]!r}, it must be a question, a tab, and Yes or No")
            continue
        yield Example(
            f"{subtask}/{path.stem}:{number}", "mme", image, (Turn(question.strip(), answer.strip()),),
            references=(answer.strip(),),
            facts={"subtask": subtask, "image_name": image.name, "question_number": number},
        )  # fmt: skip
