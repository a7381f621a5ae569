"""Asking a checkpoint in the terminal: a single question, or a conversation."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..data.example import Box, Turn
from ..data.images import open_image
from .answering import Answerer
from .checkpoint import resolve_checkpoint
from .conversation import Answer, Conversation, Streams, history_of, question_of
from .drawing import asked_mark, check_picture_name, draw_boxes, predicted_marks, save_picture
from .terminal import preview

HELP = """\
Ask in words; [x1,y1,x2,y2] is a box and [x,y] a point, in pixels of the image: what is in [10,20,30,40]?
  /image FILE   ask about another image; the conversation begins anew
  /save FILE    save the picture with the last boxes (.png, .jpg, .webp)
  /history      what was said so far
  /new          forget what was said
  /help         this
  /quit         leave, as the end of input does"""


def ask(checkpoint: Path | str, image: Path | str, question: str, *, out: Path | str = "answer.png") -> Answer:
    """One question about one image; where boxes are asked or answered, the picture with them is saved to `out`.

    Raises ValueError, before anything is loaded, for a folder that is no checkpoint, an image that is missing, broken
    or too large, and a name that is no picture's.
    """
    image, out = Path(image), Path(out)
    resolve_checkpoint(checkpoint)
    _check_out(out, image)
    open_image(image)
    conversation = Conversation(Answerer(checkpoint), image)
    answer = conversation.ask(question)
    if answer.boxes:
        save_picture(drawn(conversation), out)
    return answer


def chat(
    checkpoint: Path, question: str | None, *, image: Path | None, out: Path, knock_out: str = "",
    history: int | None = None, max_new_tokens: int = 256,
) -> None:  # fmt: skip
    """The command: prints one answer, or holds a conversation when there is no question.

    history: how many former turns go with a question; None is what the checkpoint was trained for (`history_of`).
    """
    resolve_checkpoint(checkpoint)
    if image is not None:
        open_image(image)
        _check_out(out, image)
    elif question is not None:
        raise ValueError("there is no image to ask about: add --image FILE")
    single = history is None and history_of(checkpoint) == 0
    answerer = Answerer(checkpoint, knock_out=knock_out, max_new_tokens=max_new_tokens)
    talk = Talk(answerer, out, 0 if single else history)
    if image is not None:
        talk.conversation = Conversation(answerer, image, talk.history)
    if question is not None:
        talk.ask(question)
        return
    note = "Each question is asked on its own, as this model was trained; --history 8 sends the last eight turns along."
    print(HELP, *([note] if single else []), sep="\n")
    talk.converse()


@dataclass
class Talk:
    """A conversation in the terminal. out: where answers with boxes are drawn."""

    answerer: Streams
    out: Path
    history: int | None = None
    conversation: Conversation | None = None
    commands: dict[str, Callable[[str], None]] = field(init=False)

    def __post_init__(self) -> None:
        self.commands = {
            "/image": self.open, "/save": self.save, "/history": self.tell, "/new": self.forget,
            "/help": lambda _: print(HELP),
        }  # fmt: skip

    def converse(self) -> None:
        """Reads questions from the terminal until /quit or the end of input. What goes wrong with one is said, no more."""
        for line in lines():
            word, _, rest = line.partition(" ")
            try:
                if word == "/quit":
                    return
                if word in self.commands:
                    self.commands[word](rest.strip())
                elif word.startswith("/"):
                    raise ValueError(f"there is no {word}; commands: {', '.join(self.commands)}, /quit")
                elif line:
                    self.ask(line)
            except (ValueError, OSError, RuntimeError) as error:  # no such ~user, no memory left
                print(f"error: {' '.join(str(error).split())}")
            except KeyboardInterrupt:
                print("\n(stopped; the question is not remembered)")

    def ask(self, question: str) -> None:
        """Prints the answer as it grows; boxes are drawn, saved, and shown where the terminal can."""
        conversation = self._about()
        answer = _printed(conversation.stream(question))
        if answer.boxes:
            picture = drawn(conversation)
            preview(picture)
            print(f"drawn in {save_picture(picture, _check_out(self.out, conversation.image))}")

    def open(self, name: str | Path) -> None:
        """Turns to another image, which is kept out of the way of a mistyped one."""
        said = str(name).strip("'\"")
        if not said:
            raise ValueError("no file is named: /image FILE")
        conversation = Conversation(self.answerer, Path(said).expanduser(), self.history)
        self.conversation = conversation
        print(f"{conversation.image.name}: {conversation.size[0]} x {conversation.size[1]} pixels")

    def save(self, name: str) -> None:
        conversation = self._about()
        path = _check_out(Path(name.strip("'\"")).expanduser(), conversation.image)
        print(f"drawn in {save_picture(drawn(conversation), path)}")

    def tell(self, _: str = "") -> None:
        conversation = self._about()
        for turn, answer in zip(conversation.turns, conversation.answers, strict=True):
            print(f"> {question_of(turn)}\n{described(answer)}")

    def forget(self, _: str = "") -> None:
        self.conversation = Conversation(self.answerer, self._about().image, self.history)

    def _about(self) -> Conversation:
        if self.conversation is None:
            raise ValueError("no image yet: /image FILE")
        return self.conversation


def drawn(conversation: Conversation) -> Image.Image:
    """The image with the boxes of the last question, yellow, and of its answer."""
    image = open_image(conversation.image)
    if not conversation.turns:
        return draw_boxes(image, [])
    asked = boxes_of(conversation.turns[-1])
    return draw_boxes(image, [*map(asked_mark, asked), *predicted_marks(conversation.answers[-1].boxes)])


def boxes_of(turn: Turn) -> tuple[Box, ...]:
    """The boxes of a question, in order."""
    return tuple(box for group in turn.question_boxes for box in group)


def described(answer: Answer) -> str:
    """The answer's text, its boxes in pixels of the original image."""
    return answer.shown or "(no answer)"


def lines() -> Iterator[str]:
    """What is typed, without spaces around it, until the end of input or an interruption at the prompt."""
    if sys.stdin.isatty() and importlib.util.find_spec("readline"):
        import readline  # noqa: F401  (arrow keys and former lines in `input`)
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _printed(answers: Iterator[Answer]) -> Answer:
    """Prints each answer's new end, and the last one whole where it did not begin as the former ones did."""
    said, answer = "", Answer("")
    for answer in answers:
        if answer.shown.startswith(said):
            print(answer.shown[len(said) :], end="", flush=True)
            said = answer.shown
    if answer.shown != said:
        print(f"\n{answer.shown}", end="")
    print("" if answer.shown else described(answer))
    return answer


def _check_out(out: Path, image: Path) -> Path:
    check_picture_name(out)
    if out.exists() and image.exists() and out.samefile(image):
        raise ValueError(f"{out} is the image itself; choose another name")
    return out
