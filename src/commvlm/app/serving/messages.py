"""Chat completions as they are asked: OpenAI's fields, checked, as a dialogue about at most one image."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...data.example import BOXES, IMAGE, RESERVED, Box, Turn
from ...data.templates import SYSTEM
from .limits import Refusal

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "functions": ([],), "logit_bias": ({},),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "frequency_penalty": (0,), "presence_penalty": (0,), "web_search_options": (), "audio": (),
}  # fmt: skip
"""What would change an answer and is not offered: field -> the values with which it does not."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w-]+=[^;,]*)*;base64,", re.IGNORECASE)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageLink(BaseModel):
    """url: a data URL, `data:image/png;base64,...`. Addresses are never fetched."""

    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageLink


class BoxPart(BaseModel):
    """Ours: a box of the question, x1, y1, x2, y2 in pixels of the image as it was sent."""

    type: Literal["box"]
    box: tuple[float, float, float, float]


AnyPart = TextPart | ImagePart | BoxPart


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[AnyPart, Field(discriminator="type")]], BeforeValidator(_as_parts)]
    """A text alone stands for one part."""


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A body of POST /v1/chat/completions. Fields that are not here are ignored, but for those of `NEUTRAL`."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    """0 or none: the likeliest token at every step."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(default=None, max_length=256)

    @property
    def stops(self) -> tuple[str, ...]:
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in listed if text)


@dataclass(frozen=True)
class Dialogue:
    """What is asked: turns whose last answer is empty, the image's bytes, and the text before the first turn."""

    turns: tuple[Turn, ...]
    image: bytes | None
    system: str


def read_request(body: bytes) -> ChatRequest:
    """Raises Refusal (400) with the field for what is no such request, or asks for what is not offered."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(step) for step in first["loc"])
        message = f"{field}: {first['msg']}" if field else str(first["msg"])
        raise Refusal(400, message[:300], code="invalid_request", field=field[:100] or None) from error
    for name, neutral in NEUTRAL.items():
        given = (request.model_extra or {}).get(name)
        if given is not None and given not in neutral:
            raise Refusal(400, f"{name}={str(given)[:80]} is not offered; leave it out", code="unsupported", field=name)
    return request


def read_dialogue(messages: list[Message]) -> Dialogue:
    """Raises Refusal (400), with the message's number, for a dialogue that the model cannot have."""
    system, talk = SYSTEM, messages
    if messages[0].role in ("system", "developer"):
        system, talk = _text_only(messages[0], "messages.0"), messages[1:]
    first = len(messages) - len(talk)
    for place, message in enumerate(talk):
        expected = ("user", "assistant")[place % 2]
        if message.role != expected:
            raise _wrong(
                f"messages.{first + place}",
                f"is of {message.role}, {expected} was expected: after at most one system message, "
                "user and assistant take turns",
            )
    if len(talk) % 2 == 0:
        raise _wrong(f"messages.{len(messages) - 1}", "the last message must be the user's question")
    turns, image = [], None
    for place in range(0, len(talk), 2):
        where = f"messages.{first + place}"
        question, boxes, shown = _question(talk[place], where)
        if shown is not None:
            if place:
                raise _wrong(where, "an image belongs into the first user message; begin anew with another image")
            image, question = shown, f"{IMAGE}\n{question}"
        answer = _text_only(talk[place + 1], f"messages.{first + place + 1}") if place + 1 < len(talk) else ""
        turns.append(Turn(question, answer, question_boxes=tuple((box,) for box in boxes)))
    if image is None and any(turn.boxes for turn in turns):
        raise _wrong("messages", "a box needs an image to lie in; send one in the first user message")
    return Dialogue(tuple(turns), image, system)


def _question(message: Message, where: str) -> tuple[str, list[Box], bytes | None]:
    """Text with a slot for each box, the boxes, and the image's bytes."""
    text, boxes, images = "", [], []
    for place, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            images.append(read_data_url(part.image_url.url, where=f"{where}.content.{place}.image_url.url"))
        elif isinstance(part, BoxPart):
            boxes.append(part.box)
            text += BOXES
        else:
            text += _plain(part.text, f"{where}.content.{place}.text")
    if len(images) > 1:
        raise _wrong(where, f"shows {len(images)} images; the model was trained on one image a conversation")
    if not text.strip():
        raise _wrong(where, "asks nothing; add a text such as: Where is the red star?")
    return text, boxes, images[0] if images else None


def _text_only(message: Message, where: str) -> str:
    texts = [part for part in message.content if isinstance(part, TextPart)]
    if len(texts) < len(message.content):
        raise _wrong(where, f"a message of {message.role} holds text only")
    return "".join(_plain(part.text, where) for part in texts)


def _plain(text: str, where: str) -> str:
    slot = next((slot for slot in RESERVED if slot in text), None)
    if slot is not None:
        raise _wrong(where, f"spells {slot}, which stands for something else here; send images and boxes as parts")
    return text


def read_data_url(url: str, *, where: str) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises Refusal (400) for anything else: nothing is ever fetched."""
    start = _DATA_URL.match(url)
    if start is None:
        kind = url.split(":", 1)[0][:20] if ":" in url[:20] else "no"
        raise Refusal(
            400,
            f"{where}: is a {kind} URL; images are not fetched, send data:image/png;base64,...",
            code="unsupported_image_url",
            field=where,
        )
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(where, f"is no base64 ({error})") from error


def _wrong(where: str, message: str) -> Refusal:
    return Refusal(400, f"{where}: {message}", code="invalid_request", field=where)
