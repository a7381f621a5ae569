"""One visitor's side of the demo: an image, what is marked in it, the dialogue about it, the answer without some part."""

from __future__ import annotations

import base64
import io
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...data.example import Box, Point
from ...data.images import FORMATS, open_image
from ...microworld import language
from ...microworld.scene import Scene, generator, render, sample_scene
from ..answering import Answerer
from ..conversation import Answer, Conversation
from ..drawing import ASKED, PREDICTED
from .seeing import Map, Seeing

MAX_PIXELS = 25_000_000
"""Width x height of an uploaded image; a phone's photo has 12 million and more."""
MAX_SIDE = 8_000
"""Pixels; the image is padded to a square."""
MAX_BYTES = 16 * 2**20
"""Of an uploaded file, and of any request."""
MAX_QUESTION = 2000
"""Characters."""
PREVIEW = 1280
"""Longer side in pixels of what the browser is sent of a large image."""
OFF = "#0072B2"
"""Boxes of the second answer, with parts switched off."""
GRID = 2
"""Pixels: the boxes of the micro world, and so what its models can read, lie on even numbers."""
SUGGESTED = ("Describe the image in one sentence.", "How many people are there?", "Is there a dog in the image?")


@dataclass
class Session:
    """What one visitor looks at. Raises ValueError for an image that cannot be read; nothing is changed then."""

    answerer: Answerer
    history: int | None = None
    scene: Scene | None = None
    conversation: Conversation | None = None
    seeing: Seeing | None = None
    point: Point | None = None
    box: Box | None = None
    without: tuple[str, Answer] | None = None
    """What was off, and what was said then."""
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="commvlm-demo-", ignore_cleanup_errors=True)
    )

    def pick(self, index: int) -> None:
        """Turns to test scene `index` of the micro world, its first object marked."""
        scene = sample_scene("test", index)
        self._open(Image.fromarray(render(scene)), scene)
        self.point = scene.things[0].center

    def upload(self, path: Path) -> None:
        """Turns to a file that was sent: upright as its EXIF says, since here nobody has annotated it. At most MAX_BYTES and
        MAX_PIXELS."""
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"the file has more than {MAX_BYTES // 2**20} MiB; make the image smaller first")
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"this is no image that can be read; {', '.join(FORMATS)} can") from error
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:  # it is padded to a square
            raise ValueError(
                f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,} or {MAX_SIDE:,} on a side; make it "
                "smaller first"
            )
        self._open(_upright(path), None)

    def _open(self, image: Image.Image, scene: Scene | None) -> None:
        path = Path(self.folder.name) / f"{np.random.default_rng().integers(2**62):x}.png"
        image.save(path, compress_level=1)
        before = self.conversation
        self.conversation, self.seeing = Conversation(self.answerer, path, self.history), Seeing(self.answerer, path)
        self.scene, self.point, self.box, self.without = scene, None, None, None
        if before is not None:
            before.image.unlink(missing_ok=True)

    @property
    def about(self) -> Conversation:
        """The dialogue. Raises ValueError where there is no image yet."""
        if self.conversation is None:
            raise ValueError("there is no image yet; pick a scene or upload one")
        return self.conversation

    def anew(self) -> None:
        """Forgets the dialogue, not the image."""
        self.conversation = Conversation(self.answerer, self.about.image, self.history)
        self.without = None

    def remember(self, turns: int | None) -> None:
        """How many former turns go with a question; None is all."""
        self.history = turns
        if self.conversation is not None:
            self.conversation.history = turns

    def ask(self, question: str) -> Iterator[Answer]:
        """The answer as it grows. Raises ValueError as `Conversation.stream`, and for one that is too long."""
        if len(question) > MAX_QUESTION:
            raise ValueError(f"the question has {len(question)} characters, more than {MAX_QUESTION}; make it shorter")
        self.without = None
        return self.about.stream(question)

    def ask_without(self, off: Sequence[str]) -> Iterator[Answer]:
        """The last question with encoders and layers switched off: "dinov2", "clip:3"."""
        if not off:
            raise ValueError("nothing is switched off: choose an encoder or some layers first")
        for answer in self.about.again(",".join(off)):
            self.without = ", ".join(off), answer
            yield answer

    def mark_point(self, said: Any) -> Point:
        """Marks [x, y] in pixels of the image, as the page sent it. Raises ValueError for anything else."""
        x, y = self._inside(said, 2)
        self.point = (x, y)
        return self.point

    def mark_box(self, said: Any) -> Box:
        """Marks [x1, y1, x2, y2], as `mark_point`."""
        x1, y1, x2, y2 = self._inside(said, 4)
        self.box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        return self.box

    def _inside(self, said: Any, count: int) -> list[float]:
        size = self.about.size
        if not isinstance(said, list) or [v for v in said if isinstance(v, int | float) and isfinite(v)] != said:
            said = []
        if len(said) != count:
            raise ValueError(f"{count} numbers in pixels mark a place in the image")
        return [float(min(max(value, 0), size[k % 2])) for k, value in enumerate(said)]

    def maps(self) -> list[Map]:
        """The similarity maps at the point; none where there is no point."""
        return [] if self.seeing is None or self.point is None else self.seeing.maps(self.point)

    def stage(self, growing: Answer | None = None) -> dict[str, Any]:
        """What is drawn over the image, in its pixels. growing: an answer that is not yet remembered."""
        conversation = self.about
        width, height = conversation.size
        marks: list[dict[str, Any]] = []
        answer = growing or (conversation.answers[-1] if conversation.answers else Answer(""))
        if growing is None and conversation.turns:
            asked = [box for group in conversation.turns[-1].question_boxes for box in group]
            marks += [{"box": box, "color": ASKED, "label": "asked", "dashed": False} for box in asked]
        label = "all on" if self.without else "answer"
        for k, box in enumerate(answer.boxes):
            marks.append({"box": box, "color": PREDICTED[k % len(PREDICTED)], "label": label, "dashed": False})
        if self.without:
            marks += [{"box": b, "color": OFF, "label": "without", "dashed": True} for b in self.without[1].boxes]
        snap = GRID if self.scene else 1
        return {
            "width": width, "height": height, "snap": snap, "marks": marks, "point": self.point, "box": self.box,
        }  # fmt: skip

    def picture(self) -> str:
        """The image as a data URL, reduced where it is large."""
        image = open_image(self.about.image)
        small = max(image.size) <= PREVIEW
        if not small:
            image.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
        return data_url(image, "PNG" if small else "JPEG")

    def suggestions(self) -> tuple[str, ...]:
        """Questions for this image; about a scene, ones whose answers are known to be in it."""
        if self.scene is None:
            return SUGGESTED
        first, *_, last = self.scene.things
        rng = generator("test", self.scene.index, 20)
        color = language.color(self.scene, rng)
        return (
            f"Where is {language.expressions(self.scene, first)[0]}?",
            f"Where is {language.expressions(self.scene, last)[0]}?",
            *([] if color is None else [color.text]),
            language.presence(self.scene, last.category).text,
            "Describe the image in one sentence.",
        )

    def close(self) -> None:
        """Removes the visitor's images."""
        self.folder.cleanup()


def _upright(path: Path) -> Image.Image:
    """The image, turned as its EXIF says where that can be read; errors do not tell the server's own path."""
    try:
        image = open_image(path)
    except ValueError as error:
        raise ValueError(f"the image {str(error).removeprefix(f'{path}: ')}") from error
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error):
        return image


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """A picture inside a page."""
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
