"""An answer's text as its tokens arrive, and the bodies that carry it."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ...data.boxes import Codec, boxes_in_pixels
from ...data.example import Box
from ...data.geometry import View

Groups = list[tuple[Box, ...]]


class Text:
    """Ids -> text that is certain: never half a character, never what a stop text may begin with.

    The pieces put together are what the whole answer decodes to, without spaces around it, up to the first stop text.
    """

    def __init__(self, tokenizer: Any, *, stops: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.said, self.stopped = "", False

    def take(self, ids: tuple[int, ...], *, last: bool) -> str:
        """-> the next piece; empty where nothing is certain yet. last: no more ids will come."""
        self.ids.extend(ids)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.stopped, last = text[: min(found)].rstrip(), True, True
        if not last:
            held = max((len(stop) for stop in self.stops), default=1) - 1
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            text = text[: max(0, len(text) - held)].rstrip() if held else text
        if not text.startswith(self.said):  # decoders may join tokens anew; what was sent stays sent
            return ""
        piece, self.said = text[len(self.said) :], text
        return piece


@dataclass
class Completion:
    """One answer's bodies, in OpenAI's form with `boxes` beside the text: for every group in it a list of boxes
    x1, y1, x2, y2 in pixels of the image as it was sent."""

    model: str
    text: Text
    view: View | None
    codec: Codec
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    sent_boxes: int = 0

    @property
    def boxes(self) -> Groups:
        return [] if self.view is None else boxes_in_pixels(self.text.said, self.view, self.codec)

    @property
    def usage(self) -> dict[str, int]:
        said = len(self.text.ids)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": said,
            "total_tokens": self.prompt_tokens + said,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text.said, "boxes": self.boxes}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    def chunk(self, piece: str | None = None, *, finish: str | None = None) -> str:
        """One event of a stream. Boxes come with the piece that completes them; piece None opens the answer."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if piece is None and finish is None else {}
        if piece:
            delta["content"] = piece
            if new := self.boxes[self.sent_boxes :]:
                delta["boxes"], self.sent_boxes = new, self.sent_boxes + len(new)
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self) -> str:
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage})


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


DONE = "data: [DONE]\n\n"
