"""Asking a checkpoint about one image: a single question, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..data.boxes import PadSquare, boxes_in_pixels
from ..data.example import BOXES, IMAGE, Box, Example, Turn
from ..data.images import open_image
from .answering import Answerer, resolve_checkpoint
from .drawing import check_picture_name, draw_boxes, predicted_marks, save_picture

HELP = "/image FILE: ask about another image   /save FILE: save it with the last boxes   /quit"


@dataclass(frozen=True)
class Answer:
    """What was answered. boxes: those in the text, in pixels of the original image. picture: where it was drawn."""

    text: str
    boxes: tuple[Box, ...]
    picture: Path | None = None


@dataclass
class Conversation:
    """Questions about one image, each asked with all that was said before."""

    answerer: Callable[[Sequence[Example]], list[str]]
    image: Path
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = open_image(self.image).size

    def ask(self, question: str) -> Answer:
        """The question goes in as it is, the image in front of the first one. Raises ValueError for an empty question,
        one that spells a slot or a special token, and a conversation that has become too long for the model."""
        if not question.strip():
            raise ValueError("the question is empty; ask something such as: where is the red star?")
        slot = next((slot for slot in (IMAGE, BOXES) if slot in question), None)
        if slot:
            raise ValueError(f"the question spells {slot}, which stands for something else here; reword it")
        first = "" if self.turns else f"{IMAGE}\n"
        asked = Turn(first + question, "")
        example = Example("the conversation", "dialogue", self.image, (*self.turns, asked))
        (text,) = self.answerer([example])
        self.turns.append(Turn(asked.question, text.replace(BOXES, "").replace(IMAGE, "")))
        groups = boxes_in_pixels(text, PadSquare(*self.size))
        return Answer(text, tuple(box for group in groups for box in group))

    def draw(self, boxes: tuple[Box, ...]) -> Image.Image:
        return draw_boxes(open_image(self.image), predicted_marks(boxes))


def ask(checkpoint: Path | str, image: Path | str, question: str, *, out: Path | str = "answer.png") -> Answer:
    """One question about one image; where the answer holds boxes, the picture with them is saved to `out`.

    Raises ValueError, before anything is loaded, for a folder that is no checkpoint, an image that is missing, broken
    or too large, and a name that is no picture's.
    """
    image, out = Path(image), Path(out)
    resolve_checkpoint(checkpoint)
    _check_out(out, image)
    open_image(image)
    conversation = Conversation(Answerer(checkpoint), image)
    answer = conversation.ask(question)
    if not answer.boxes:
        return answer
    return Answer(answer.text, answer.boxes, save_picture(conversation.draw(answer.boxes), out))


def chat(checkpoint: Path, question: str | None, *, image: Path | None, out: Path) -> None:
    """The command: prints one answer, or holds a conversation when there is no question."""
    if question is None:
        converse(checkpoint, image)
        return
    if image is None:
        raise ValueError("there is no image to ask about: add --image FILE")
    answer = ask(checkpoint, image, question, out=out)
    print(describe(answer))
    if answer.picture is not None:
        print(f"drawn in {answer.picture}")


def describe(answer: Answer) -> str:
    """The answer's text, and below it each of its boxes in pixels of the original image."""
    number = (lambda k: f" {k}") if len(answer.boxes) > 1 else (lambda k: "")
    lines = [answer.text or "(no answer)"]
    for k, (x1, y1, x2, y2) in enumerate(answer.boxes, start=1):
        lines.append(f"box{number(k)}: x {x1:.1f} to {x2:.1f}, y {y1:.1f} to {y2:.1f} pixels")
    return "\n".join(lines)


def converse(checkpoint: Path, image: Path | None) -> None:
    """Reads questions from the terminal until /quit or the end of input. What goes wrong with one is said, no more."""
    answerer = Answerer(checkpoint)
    conversation = None if image is None else Conversation(answerer, image)
    boxes: tuple[Box, ...] = ()
    print(HELP)
    while (line := _read()) not in (None, "/quit"):
        word, _, rest = str(line).partition(" ")
        try:
            if word == "/image":
                conversation, boxes = Conversation(answerer, Path(rest.strip())), ()
            elif conversation is None:
                print("no image yet: /image FILE")
            elif word == "/save":
                print(save_picture(conversation.draw(boxes), _check_out(Path(rest.strip()), conversation.image)))
            elif word.startswith("/"):
                print(HELP)
            elif line:
                answer = conversation.ask(str(line))
                boxes = answer.boxes
                print(describe(answer))
        except (ValueError, OSError) as error:
            print(f"error: {error}")


def _read() -> str | None:
    """The next line without spaces around it; None at the end of input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _check_out(out: Path, image: Path) -> Path:
    check_picture_name(out)
    if out.exists() and image.exists() and out.samefile(image):
        raise ValueError(f"{out} is the image itself; choose another --out")
    return out
