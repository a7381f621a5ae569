"""REG, referring expression generation: a box is asked, an expression is answered; CIDEr per object by default.

As in https://github.com/lichengunc/refer (refEvaluation.py) one object is one item: all expressions people gave it are
its references, stripped to ASCII, and document frequencies are counted over objects.

The rules whose name begins with `sentence-` take every expression as an item of its own with one reference, in lower case,
as NExT-Chat's evaluation does; such figures are lower, and not comparable with the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from .sentences import Item, items_of, parse, references_of, score
from .task import Record, Task

SENTENCE = "sentence-"
TOKENIZED = ("approximate", "ptb")


def object_of(record: Record) -> Hashable:
    """refer's ref_id where the record has it; otherwise the same image and the same box are the same object."""
    if "ref_id" in record.facts:
        return "ref", record.facts["ref_id"]
    if not record.asked_boxes:
        raise ValueError(f"{record.name}: a REG question must ask about a box, this one holds none")
    return record.cluster, record.asked_boxes


def by_object(records: Sequence[Record]) -> list[Item]:
    return [
        Item(_ascii(item.text), tuple(map(_ascii, item.references)), item.cluster, item.id)
        for item in items_of(records, object_of)
    ]


def by_sentence(records: Sequence[Record]) -> list[Item]:
    return [
        Item(record.text.strip().lower(), (text.lower(),), record.cluster, record.id)
        for record in sorted(records, key=lambda record: record.id)
        for text in references_of(record)
    ]


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode()


REG = Task(
    name="reg",
    parse=parse,
    rules={
        f"{prefix}{name}": partial(
            score, task="reg", rule=f"{prefix}{name}", tokenizer=name, grouping=grouping
        )
        for prefix, grouping in (("", by_object), (SENTENCE, by_sentence))
        for name in TOKENIZED
    },
)  # fmt: skip
