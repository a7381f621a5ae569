"""Tasks answered with a sentence, scored by CIDEr-D: captions of images, and REG's expressions of objects.

Rules are the tokenizers: `approximate` needs no Java, `ptb` is the official one and brings BLEU and ROUGE-L with it.
CIDEr knows one hypothesis per thing that is described. Records of one thing are therefore one item: all their references
count, and the answer is that of the first record by id.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics import TOKENIZERS, bleu_and_rouge, bootstrap, cider_d
from .task import NO_FACTS, Facts, Parsed, Record, Score, Size, interval_in_percent, percent


@dataclass(frozen=True)
class Item:
    """One described thing: the answer, what it is held against, the image it is in, and the first record's id."""

    text: str
    references: tuple[str, ...]
    cluster: str
    id: str


Grouping = Callable[[Sequence[Record]], list[Item]]
"""Records -> what is scored, one hypothesis each."""


def parse(text: str, size: Size | None, facts: Facts = NO_FACTS) -> Parsed:
    """The sentence as it is; None for an empty answer."""
    return text.strip() or None


def items_of(records: Sequence[Record], thing: Callable[[Record], Hashable]) -> list[Item]:
    """Records of one thing put together, in the order of their first ids. The true answer stands in for references."""
    groups: dict[Hashable, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.id):
        groups.setdefault(thing(record), []).append(record)
    return [
        Item(
            text=group[0].text.strip(),
            references=tuple(text for record in group for text in references_of(record)),
            cluster=group[0].cluster,
            id=group[0].id,
        )
        for group in groups.values()
    ]


def references_of(record: Record) -> tuple[str, ...]:
    return record.references or (record.answer,)


def tokenized(items: Sequence[Item], tokenizer: str) -> tuple[list[str], list[list[str]]]:
    """One pass of the tokenizer over all texts -> (hypotheses, references of each item)."""
    tokens = iter(TOKENIZERS[tokenizer]([text for item in items for text in (item.text, *item.references)]))
    table = [(next(tokens), [next(tokens) for _ in item.references]) for item in items]
    return [said for said, _ in table], [references for _, references in table]


def score(records: Sequence[Record], *, task: str, rule: str, tokenizer: str, grouping: Grouping) -> Score:
    """CIDEr-D times 100. Its standard error holds the document frequencies fixed at those of the whole set."""
    items = grouping(records)
    said, references = tokenized(items, tokenizer)
    cider = cider_d(said, references)
    error, interval = interval_in_percent(bootstrap(cider.per_image, [item.cluster for item in items]))
    exact = np.mean([text in truths for text, truths in zip(said, references, strict=True)])
    extra: dict[str, object] = {"exact": percent(float(exact)), "predictions": len(records), "tokenizer": tokenizer}
    if tokenizer == "ptb":
        extra |= {name: percent(share) for name, share in bleu_and_rouge(said, references).items()}
    return Score(
        task=task,
        metric="CIDEr",
        rule=rule,
        value=percent(cider.corpus),
        standard_error=error,
        interval=interval,
        n=len(items),
        unparsable=sum(not item.text for item in items),
        extra=extra,
        marks=_marks(items, cider.per_image),
    )


def _marks(items: Sequence[Item], per_item: np.ndarray) -> dict[str, float]:
    """By id; several items of one record (a sentence each) are numbered."""
    marks: dict[str, float] = {}
    for item, value in zip(items, per_item.tolist(), strict=True):
        name, number = item.id, 1
        while name in marks:
            number += 1
            name = f"{item.id}#{number}"
        marks[name] = value
    return marks
