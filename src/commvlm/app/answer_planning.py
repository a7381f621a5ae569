"""What answering a recipe's questions costs before it starts, on the machine and with the texts of `planning`.

As `decoding` does it: the encoders and the language model read an image once, then the rest of each of its questions, then
all of a batch's answers grow a token at a time. A step reads every weight of the language model once, and starts its layers
one by one from Python: it takes as long as whichever is slowest of that, of reading the weights, and of computing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..model.config import CommConfig
from ..model.dry import Way, fake_model
from .planning import Machine, Text

LAYER = 0.45e-3
"""Seconds that starting one layer of a step takes: measured with a Llama of 32 layers of 64 numbers on one core of a CPU
(14 ms a step); a GPU's kernels are started by the same code."""


@dataclass(frozen=True)
class Load:
    """questions: how many. images: how often an image is read anew for them, which is once in each set of questions."""

    questions: int
    images: int


@dataclass(frozen=True)
class Reader:
    """A language model as answering sees it. body: its numbers but for the embeddings; head: of the head; layers: blocks."""

    body: int
    head: int
    layers: int

    @classmethod
    def of(cls, config: CommConfig) -> Reader:
        """Counted on a model without memory."""
        with fake_model(config, Way(frozenset())) as model:
            words: Any = model.get_input_embeddings()
            body = sum(p.numel() for p in model.model.language_model.parameters()) - words.weight.numel()
            text: Any = config.text_config
            head: Any = model.lm_head
            return cls(body, head.weight.numel(), int(text.num_hidden_layers))


def answering_hours(
    reader: Reader, load: Load, on: Machine, *, tokens: int, visual: float, batch: int, half: bool, text: Text
) -> float:
    """Hours of all processes together, each with its share of the images.

    tokens: visual ones of an image. visual: FLOPs of its visual half. batch: questions at once. half: in bfloat16. Attention
    and the images' decoding are not counted.
    """
    speed = on.peak * on.efficiency
    prefix = visual + 2 * reader.body * (tokens + text.front)
    rest = 2 * reader.body * (text.words - text.answer)
    read = (load.images * prefix + load.questions * rest) / speed
    computed = 2 * (reader.body + reader.head) * batch / speed
    fetched = (2 if half else 4) * (reader.body + reader.head) / on.bandwidth
    steps = load.questions / batch * text.answer
    return (read + steps * max(computed, fetched, LAYER * reader.layers)) / on.count / 3600
