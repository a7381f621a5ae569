"""A dialogue made ready for the model: its ids, and its image decoded, shrunk to what encoders see, and let go."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...data.example import Example
from ...data.geometry import GEOMETRIES, View
from ...data.images import decode_image
from ..answering import Answerer
from .limits import Limits, Refusal
from .messages import Dialogue

CHARACTERS = 32
"""A token's at the very most, on average over a text: more than that is not even counted in tokens."""
UNSTATED = 32_768
"""Tokens that a language model is held to take where it does not say."""


@dataclass(frozen=True)
class Asked:
    """ids (n,); most: tokens of the answer; pixels (P,) of the image, known by its content's hash; view: of the image as it
    was sent."""

    ids: Tensor
    most: int
    image: Path | None = None
    pixels: Tensor | None = None
    view: View | None = None


def prepare(dialogue: Dialogue, answerer: Answerer, *, limits: Limits, tokens: int | None) -> Asked:
    """tokens: of the answer; None for as many as there is room for, within the limits. Raises Refusal (400) for an image that
    cannot be read, text that spells a special token, and a conversation that is too long: by far, and it is not tokenised."""
    if tokens is not None and tokens > limits.tokens:
        raise Refusal(
            400,
            f"max_tokens is {tokens}, this server gives {limits.tokens}",
            code="invalid_request",
            field="max_tokens",
        )
    written = len(dialogue.system) + sum(len(turn.question) + len(turn.answer) for turn in dialogue.turns)
    if written > CHARACTERS * (answerer.longest or UNSTATED):
        raise _too_long(f"{written} characters", answerer.longest or UNSTATED)
    collator = dataclasses.replace(answerer.collator, max_length=None)
    image = None if dialogue.image is None else Path(hashlib.sha256(dialogue.image).hexdigest())
    example = Example("messages", "dialogue", image, dialogue.turns)
    try:
        picture = None if dialogue.image is None else decode_image(dialogue.image, name="the image", side=limits.side)
        shown = {} if image is None or picture is None else {image: picture}
        (row,) = collator.prompts([example], shown, system=dialogue.system)
    except ValueError as error:
        raise Refusal(400, str(error).removeprefix("example "), code="invalid_request", field="messages") from error
    most = _room(len(row), tokens, answerer.longest, limits.tokens)
    if picture is None:
        return Asked(torch.from_numpy(row), most)
    pixels = collator.image_processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    return Asked(torch.from_numpy(row), most, image, pixels, GEOMETRIES[collator.geometry](*picture.size))


def _room(length: int, tokens: int | None, longest: int | None, limit: int) -> int:
    """Tokens of an answer behind a prompt of `length`."""
    if longest is None:
        return tokens or limit
    if length + (tokens or 1) > longest:
        raise _too_long(f"{length} tokens and its answer at least {tokens or 1}", longest)
    return tokens or min(limit, longest - length)


def _too_long(what: str, longest: int) -> Refusal:
    said = f"the conversation has {what}, the model takes {longest} tokens in all"
    return Refusal(400, said, code="context_length_exceeded", field="messages")
