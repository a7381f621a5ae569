"""Captions of images: CIDEr against all references of the image (COCO, Flickr30k: five)."""

from __future__ import annotations

from functools import partial

from ..metrics import TOKENIZERS
from .sentences import parse, score
from .task import Record, Task


def image_of(record: Record) -> str:
    return record.cluster


CAPTION = Task(
    name="caption",
    parse=parse,
    rules={name: partial(score, task="caption", tokenizer=name, thing=image_of) for name in TOKENIZERS},
)
