"""Captions of images: CIDEr against all references of the image (COCO, Flickr30k: five)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..metrics import TOKENIZERS
from .sentences import Item, items_of, parse, score
from .task import Record, Task


def by_image(records: Sequence[Record]) -> list[Item]:
    return items_of(records, lambda record: record.cluster)


CAPTION = Task(
    name="caption",
    parse=parse,
    rules={
        name: partial(score, task="caption", rule=name, tokenizer=name, grouping=by_image) for name in TOKENIZERS
    },
)  # fmt: skip
