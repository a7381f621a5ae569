"""MME: a folder of the official result files, SUBTASK.txt with lines image<TAB>question<TAB>label<TAB>answer.

The two lines of an image stand one after the other, as the official script takes them.
"""

from __future__ import annotations

from pathlib import Path

from ..metrics import SUBTASKS
from ..tasks import MME, Record, as_it_is
from .result import Official

COLUMNS = 4


def score_mme(predictions: Path, *, rule: str = "official") -> Official:
    """Figures: perception (0 to 2000), cognition (0 to 800), and of every subtask n, acc, acc_plus, score, other.

    Raises ValueError naming file, line and image for what is missing or not in the format.
    """
    if not predictions.is_dir():
        raise ValueError(f"{predictions}: there is no such folder of MME results ({SUBTASKS[0]}.txt, ...)")
    missing = [name for name in SUBTASKS if not (predictions / f"{name}.txt").is_file()]
    if missing:
        raise ValueError(
            f"{predictions}: has no {missing[0]}.txt; MME needs all {len(SUBTASKS)} files, {len(missing)} lack"
        )
    records = [record for name in SUBTASKS for record in _records(predictions / f"{name}.txt", name)]
    score = MME.score(records, rule=rule, bare=as_it_is)
    figures = {name: score.extra[name] for name in ("perception", "cognition", "subtasks")}
    return Official(score, figures, {name: predictions / f"{name}.txt" for name in SUBTASKS})


def _records(path: Path, subtask: str) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text (byte {error.start}); is it a file of MME results?") from error
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise ValueError(f"{path.name}: is empty, there is nothing to score")
    rows = [_row(line, f"{path.name}:{number}:") for number, line in enumerate(lines, start=1)]
    seen: set[str] = set()
    for number, (image, *_) in enumerate(rows[::2]):
        pair = rows[2 * number : 2 * number + 2]
        if len(pair) < 2 or pair[1][0] != image:
            raise ValueError(
                f"{path.name}:{2 * number + 1}: image {image} stands alone; its two lines must be adjacent"
            )
        if image in seen:
            raise ValueError(f"{path.name}:{2 * number + 1}: image {image} comes a second time")
        seen.add(image)
    return [_record(f"{subtask}/{image}#{1 + k % 2}", subtask, *row) for k, row in enumerate(rows) for image in row[:1]]


def _row(line: str, where: str) -> tuple[str, str, str, str]:
    cells = line.split("\t")
    if len(cells) != COLUMNS:
        raise ValueError(
            f"{where} image {cells[0][:60]!r}: {len(cells)} columns, not {COLUMNS}; answers may hold no tab or line break"
        )
    image, question, label, answer = cells
    if label.lower() not in ("yes", "no"):
        raise ValueError(f"{where} image {image}: label {label!r}, it must be Yes or No")
    return image, question, label.lower(), answer


def _record(key: str, subtask: str, image: str, question: str, label: str, text: str) -> Record:
    return Record(
        id=key, task="mme", image=f"{subtask}/{image}", width=None, height=None, question=question, text=text,
        parsed=MME.parse(text, None, {}), answer=label, facts={"subtask": subtask},
    )  # fmt: skip
