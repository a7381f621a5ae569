"""REG, referring expression generation: a box is asked, an expression is answered; CIDEr per object.

As in https://github.com/lichengunc/refer (refEvaluation.py) one object is one item: all expressions people gave it are
its references, and document frequencies are counted over objects.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

from ..metrics import TOKENIZERS
from .sentences import parse, score
from .task import Record, Task


def object_of(record: Record) -> Hashable:
    """The same image and the same box are the same object."""
    if not record.asked_boxes:
        raise ValueError(f"{record.name}: a REG question must ask about a box, this one holds none")
    return record.cluster, record.asked_boxes


REG = Task(
    name="reg",
    parse=parse,
    rules={name: partial(score, task="reg", tokenizer=name, thing=object_of) for name in TOKENIZERS},
)
