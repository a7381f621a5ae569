"""Captions of images: CIDEr against all references of the image (COCO, Flickr30k: five).

Rules: `approximate` and `ptb` by their tokenizers; `vlmevalkit` splits at blanks and nothing else, as VLMEvalKit does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .sentences import Item, items_of, parse, score
from .task import Record, Task


def by_image(records: Sequence[Record]) -> list[Item]:
    return items_of(records, lambda record: record.cluster)


RULES = {"approximate": "approximate", "ptb": "ptb", "vlmevalkit": "none"}
"""Rule -> tokenizer."""

CAPTION = Task(
    name="caption",
    parse=parse,
    rules={
        rule: partial(score, task="caption", rule=rule, tokenizer=tokenizer, grouping=by_image)
        for rule, tokenizer in RULES.items()
    },
)
