"""A conversation about one image: boxes and points in pixels of it, typed by a person and shown to one.

What a person types, `what is in [100,40,220,300]?`, is in pixels of the original image; what the model reads and says is in
the numbers that it was trained on. Both ways go through the view that the model is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ..data.boxes import boxes_in_pixels, points_in_pixels
from ..data.example import BOXES, IMAGE, POINTS, RESERVED, Box, Example, Point, Turn
from ..data.geometry import View
from ..data.images import open_image
from .checkpoint import resolve_checkpoint

Group = tuple[Box, ...] | tuple[Point, ...]
Piece = str | Group
"""Text, or what stood in one bracket, in pixels of the image."""
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_NUMBERS = re.compile(r"\s*-?\d+(?:\.\d*)?(?:\s*[,;]\s*-?\d+(?:\.\d*)?)+\s*")
DIALOGUES = ("llava", "sharegpt", "shikra-rd", "datasets")
"""Formats whose examples may have several turns."""


class Streams(Protocol):
    """What answers: `answering.Answerer`, or anything like it."""

    def stream(self, example: Example, *, knock_out: str | None = None) -> Iterator[str]:
        """The answer as it grows, all of it each time."""
        ...

    def view(self, width: int, height: int) -> View:
        """What the model is shown of an image of that size."""
        ...


@dataclass(frozen=True)
class Answer:
    """text: what was said, word for word. pieces: the same with each bracket of boxes or points as numbers, in pixels of the
    original image."""

    text: str
    pieces: tuple[Piece, ...] = ()

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Every box of the answer, in order."""
        return tuple(box for group in self.pieces if not isinstance(group, str) for box in group if len(box) == 4)

    @property
    def shown(self) -> str:
        """The text with its boxes in pixels, to a tenth of one."""
        return "".join(piece if isinstance(piece, str) else written(piece) for piece in self.pieces)


@dataclass
class Conversation:
    """Questions about one image, each asked with what was said before.

    history: how many former turns go with a question, None for all. Raises ValueError for an image that cannot be read.
    """

    answerer: Streams
    image: Path
    history: int | None = None
    turns: list[Turn] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = open_image(self.image).size
        self.view = self.answerer.view(*self.size)

    def ask(self, question: str) -> Answer:
        """The whole answer; see `stream`."""
        *_, answer = self.stream(question)
        return answer

    def stream(self, question: str) -> Iterator[Answer]:
        """The answer as it grows, the whole one last; only then is the turn remembered.

        The question goes in as it is, but for boxes and points, the image in front of the first one. Raises ValueError for
        an empty question, one that spells a slot or a special token, boxes that are not in the image, and a conversation
        that has become too long for the model.
        """
        asked, answer = typed(question, self.size), Answer("")
        for answer in self._answers(asked, self.turns):
            yield answer
        said = re.sub("|".join(map(re.escape, RESERVED)), "", answer.text)
        self.turns.append(replace(asked, answer=said))
        self.answers.append(answer)

    def again(self, knock_out: str) -> Iterator[Answer]:
        """The last question once more, with encoders or layers switched off (`commvlm.model.knock_out`); what is said is not
        remembered. Raises ValueError where nothing has been asked, or for what there is not."""
        if not self.turns:
            raise ValueError("nothing has been asked yet; ask first, then switch something off")
        return self._answers(replace(self.turns[-1], answer=""), self.turns[:-1], knock_out)

    def _answers(self, asked: Turn, before: Sequence[Turn], knock_out: str | None = None) -> Iterator[Answer]:
        """What the model says to a turn behind former ones, as it grows; a bracket is shown when it is whole."""
        kept = len(before) if self.history is None else min(self.history, len(before))
        first, *rest = [*before[len(before) - kept :], asked]
        turns = (replace(first, question=f"{IMAGE}\n{first.question}"), *rest)
        example = Example("the conversation", "dialogue", self.image, turns)
        text, shown = "", None
        for text in self.answerer.stream(example, knock_out=knock_out):
            shown = text.rpartition("[")[0] if _is_open(text) else text
            yield Answer(text, pieces_of(shown, self.view))
        if shown != text:
            yield Answer(text, pieces_of(text, self.view))


def typed(question: str, size: tuple[int, int]) -> Turn:
    """A question as typed -> a turn without an answer, its `[x1,y1,x2,y2]` and `[x,y]` (several behind semicolons) boxes and
    points in pixels of an image of `size`, width and height.

    Brackets that hold fractions of 1 only, such as [0.125,0.250,0.500,0.750], are the model's own text and go in as they are.
    Raises ValueError for an empty question, for one that spells a slot, and for boxes and points outside the image.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something such as: where is the red star?")
    slot = next((slot for slot in RESERVED if slot in question), None)
    if slot:
        raise ValueError(f"the question spells {slot}, which stands for something else here; reword it")
    boxes, points = list[tuple[Box, ...]](), list[tuple[Point, ...]]()

    def slot_of(bracket: re.Match[str]) -> str:
        if not _NUMBERS.fullmatch(bracket[1]):
            return bracket[0]
        group = tuple(tuple(map(float, one.split(","))) for one in bracket[1].split(";"))
        if "." in bracket[1] and all(0 <= value <= 1 for values in group for value in values):
            return bracket[0]
        _check_group(group, bracket[0], size)
        (boxes if len(group[0]) == 4 else points).append(group)  # type: ignore[arg-type]
        return BOXES if len(group[0]) == 4 else POINTS

    return Turn(_BRACKET.sub(slot_of, question), "", tuple(boxes), (), tuple(points))


def _check_group(group: Sequence[tuple[float, ...]], said: str, size: tuple[int, int]) -> None:
    """Raises ValueError for what is no group of boxes or points in an image of `size`."""
    if {len(values) for values in group} not in ({4}, {2}):
        raise ValueError(f"{said} is neither a box, [x1,y1,x2,y2], nor a point, [x,y]; several go behind semicolons")
    for values in group:
        if any(not 0 <= value <= size[k % 2] for k, value in enumerate(values)):
            raise ValueError(f"{said} does not lie in the image, which is {size[0]} pixels wide and {size[1]} high")
        if len(values) == 4 and (values[0] >= values[2] or values[1] >= values[3]):
            raise ValueError(f"box {said} holds nothing: write [x1,y1,x2,y2] with x1 < x2 and y1 < y2")


def pieces_of(text: str, view: View) -> tuple[Piece, ...]:
    """The text cut at its brackets of boxes and points, which are in pixels of the view's image; empty parts are left out."""
    pieces, end = list[Piece](), 0
    for bracket in _BRACKET.finditer(text):
        groups = boxes_in_pixels(bracket[0], view) or points_in_pixels(bracket[0], view)
        if groups:
            pieces += [text[end : bracket.start()], groups[0]]
            end = bracket.end()
    return tuple(piece for piece in (*pieces, text[end:]) if piece)


def written(group: Group) -> str:
    """[x1,y1,x2,y2;...] in pixels, to a tenth of one."""
    numbers = [",".join(f"{value:.1f}".removesuffix(".0") for value in values) for values in group]
    return f"[{';'.join(numbers)}]"


def question_of(turn: Turn) -> str:
    """A turn's question as it was typed, its boxes and points in pixels."""
    groups: dict[str, Iterator[Group]] = {BOXES: iter(turn.question_boxes), POINTS: iter(turn.question_points)}
    return re.sub(f"{BOXES}|{POINTS}", lambda slot: written(next(groups[slot[0]])), turn.question)


def history_of(checkpoint: Path | str) -> int | None:
    """How many former turns a run's model can do with: None (all of them), or 0 where its recipe (recipe.yaml beside the
    model) has no source of dialogues, so that it has only ever read single questions. None for a model without a recipe."""
    from ..train.recipe import load_recipe

    folder = resolve_checkpoint(checkpoint).parent
    recipe = folder / "recipe.yaml"
    if not (recipe.is_file() and (folder / "run.json").is_file()):  # a saved model may lie beside any file of that name
        return None
    formats = {source.format for source in load_recipe(recipe).data.sources}
    return None if formats & set(DIALOGUES) else 0


def _is_open(text: str) -> bool:
    """Whether a bracket has begun and not ended."""
    return "[" in text.rpartition("]")[2]
