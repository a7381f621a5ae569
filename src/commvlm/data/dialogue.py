"""Dialogues as Vicuna v1.1 text, and as token ids with labels: the answers are supervised by construction.

    {bos}{SYSTEM} USER: <image>\\n{question} ASSISTANT: {answer}{eos}USER: {question} ASSISTANT: {answer}{eos}

Where an answer begins and ends is written down while the text is put together, never searched for in the ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .boxes import SHIKRA3, Codec, format_boxes, format_points
from .example import BOXES, IMAGE, POINTS, Example, Turn
from .geometry import View
from .templates import SYSTEM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SLOT = re.compile(f"({re.escape(BOXES)}|{re.escape(POINTS)})")
IGNORED = -100
"""Label of a token that is not supervised (the library's loss skips it)."""

CHAT_TEMPLATE = (
    "{% macro text(content) %}"
    "{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] in ['image', 'image_url'] %}{{ '" + IMAGE + "\\n' }}{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] %}{{ text(messages[0]['content']) + ' ' }}"
    "{% else %}"
    '{% set turns = messages %}{{ "' + SYSTEM + ' " }}'
    "{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('messages must go user, assistant, user, ... after at most one system message') }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + text(message['content']) }}"
    "{% else %}{{ ' ASSISTANT:' }}"
    "{% generation %}{{ ' ' + text(message['content']) + eos_token }}{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""The same text from OpenAI-style messages, for `tokenizer.apply_chat_template`. Images come first in their message."""


@dataclass(frozen=True)
class Rendered:
    """A dialogue's text, and the [start, end) characters of its answers: a space, the answer, the end token."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """ids (n,) int64; labels (n,) int64: the id where an answer's token is supervised, -100 elsewhere."""

    ids: np.ndarray
    labels: np.ndarray


def render(
    example: Example,
    *,
    geometry: View | None,
    codec: Codec = SHIKRA3,
    eos: str = "</s>",
    bos: str = "",
    system: str = SYSTEM,
) -> Rendered:
    """The whole dialogue, its slots filled. geometry: what is shown of the example's image, None without one. codec: how
    boxes and points are written. system: the text before the first turn.

    Raises ValueError with the example's id when it has no turns, when its `<image>` slot is missing, doubled, or not in
    the first question, and for boxes without a geometry.
    """
    text, spans = f"{bos}{system} ", []
    for question, answer in filled_turns(example, geometry, codec):
        text += f"USER: {question} ASSISTANT:"
        spans.append((len(text), len(text) + 1 + len(answer) + len(eos)))
        text += f" {answer}{eos}"
    return Rendered(text, tuple(spans))


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_tokens: int,
    geometry: View | None,
    codec: Codec = SHIKRA3,
) -> Encoded:
    """The whole dialogue for training. image_tokens: how many `<image>` ids the slot becomes. See `encode_all`."""
    return encode_all([example], tokenizer, image_tokens=image_tokens, geometries=[geometry], codec=codec)[0]


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_tokens: int,
    geometries: Sequence[View | None],
    codec: Codec = SHIKRA3,
) -> list[Encoded]:
    """Every example tokenised once, all in one call. Exactly the tokens of " {answer}{eos}" are supervised.

    Raises ValueError with the example's id for what `render` refuses and for a special token spelled out in its text.
    """
    eos, bos = _marks(tokenizer)
    dialogues = []
    for example, geometry in zip(examples, geometries, strict=True):
        _check_literals(example, tokenizer)
        dialogues.append(render(example, geometry=geometry, codec=codec, eos=eos, bos=bos))
    ids, offsets = _tokenised([dialogue.text for dialogue in dialogues], tokenizer)
    image_id = image_id_of(tokenizer) if any(example.image is not None for example in examples) else None
    encoded = []
    for example, dialogue, row, places in zip(examples, dialogues, ids, offsets, strict=True):
        labels = _labels(example, dialogue.spans, row, places, tokenizer)
        times = _repeats(row, image_id, image_tokens)
        encoded.append(Encoded(np.repeat(row, times), np.repeat(labels, times)))
    return encoded


def encode_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_tokens: int,
    geometry: View | None,
    codec: Codec = SHIKRA3,
    system: str = SYSTEM,
) -> np.ndarray:
    """ids (n,) of the dialogue up to its last "ASSISTANT:", without that answer: what generation continues."""
    eos, bos = _marks(tokenizer)
    _check_literals(example, tokenizer, system)
    dialogue = render(example, geometry=geometry, codec=codec, eos=eos, bos=bos, system=system)
    ids, _ = _tokenised([dialogue.text[: dialogue.spans[-1][0]]], tokenizer)
    image_id = None if example.image is None else image_id_of(tokenizer)
    return np.repeat(ids[0], _repeats(ids[0], image_id, image_tokens))


def filled_turns(example: Example, geometry: View | None, codec: Codec) -> list[tuple[str, str]]:
    if not example.turns:
        raise ValueError(f"example {example.id}: has no turns, so there is nothing to ask and nothing to supervise")
    _check_slots(example)
    return [
        (
            _with_places(example, turn.question, (turn.question_boxes, turn.question_points), geometry, codec),
            _with_places(example, turn.answer, (turn.answer_boxes, turn.answer_points), geometry, codec),
        )
        for turn in example.turns
    ]


def _with_places(
    example: Example, text: str, places: tuple[Sequence[Any], Sequence[Any]], geometry: View | None, codec: Codec
) -> str:
    """The text with its k-th slot of boxes, or points, as the k-th group of them."""
    boxes, points = places
    if not boxes and not points:
        return text
    if geometry is None:
        raise ValueError(f"example {example.id}: has boxes but no image, so they have no place; give it its image")
    left = {BOXES: iter(boxes), POINTS: iter(points)}
    write = {BOXES: format_boxes, POINTS: format_points}
    try:
        pieces = [
            write[piece](next(left[piece]), geometry, codec) if piece in write else piece for piece in _SLOT.split(text)
        ]
    except ValueError as error:
        raise ValueError(f"example {example.id}: {error}") from error
    return "".join(pieces)


def _check_slots(example: Example) -> None:
    expected = 0 if example.image is None else 1
    found = [turn.question.count(IMAGE) for turn in example.turns]
    if found[0] != expected:
        raise ValueError(
            f"example {example.id}: its first question holds {found[0]} times {IMAGE}, it must hold {expected}: "
            "one slot for an image (templates.instruct puts it in), none without"
        )
    if any(found[1:]) or any(IMAGE in turn.answer for turn in example.turns):
        raise ValueError(f"example {example.id}: {IMAGE} stands outside the first question; only the slot may say it")


def _check_literals(example: Example, tokenizer: PreTrainedTokenizerBase, system: str = "") -> None:
    """A special token in a text would become its id: an end in the middle of an answer, an image that is none."""
    text = "\n".join([system, *(side for turn in example.turns for side in _sides(turn))])
    for token in tokenizer.all_special_tokens:
        if token and token != IMAGE and token in text:
            raise ValueError(f"example {example.id}: its text spells the special token {token}; reword or drop it")


def _sides(turn: Turn) -> tuple[str, str]:
    return turn.question, turn.answer


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """End and beginning of sequence as text; a tokenizer may do without the latter."""
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer is a slow one: a fast one is needed, it says where in the text its tokens are")
    if not tokenizer.eos_token:
        raise ValueError("the tokenizer has no eos_token, which closes every answer; set one")
    return str(tokenizer.eos_token), str(tokenizer.bos_token or "")


def image_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>`. Raises ValueError when the tokenizer has none."""
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    if not isinstance(token, int) or token == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {IMAGE} token; add it as a special token")
    return token


def _tokenised(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """ids (n,) and character offsets (n, 2) of every text."""
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = [np.asarray(row, dtype=np.int64) for row in batch["input_ids"]]
    return ids, [np.asarray(row, dtype=np.int64).reshape(-1, 2) for row in batch["offset_mapping"]]


def _labels(
    example: Example,
    spans: Sequence[tuple[int, int]],
    ids: np.ndarray,
    offsets: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
) -> np.ndarray:
    starts, ends = offsets[:, 0], offsets[:, 1]
    labels = np.full_like(ids, IGNORED)
    for start, end in spans:
        if ((starts < start) & (ends > start)).any() or ((starts < end) & (ends > end)).any():
            raise ValueError(f"example {example.id}: a token of this tokenizer reaches over the edge of an answer")
        # A trimmed space has no width: behind the start it belongs to the answer, at the start to what comes before.
        inside = (starts >= start) & (starts < end) & ((ends > starts) | (starts > start))
        labels[inside] = ids[inside]
        if not inside.any() or ids[inside][-1] != tokenizer.eos_token_id:
            raise ValueError(f"example {example.id}: the tokenizer splits its end token {tokenizer.eos_token!r}")
    return labels


def _repeats(ids: np.ndarray, image_id: int | None, image_tokens: int) -> np.ndarray:
    """How often each id is written: the slot's id image_tokens times, any other once."""
    return np.ones_like(ids) if image_id is None else np.where(ids == image_id, image_tokens, 1)
