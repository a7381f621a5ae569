"""Answerers without a model: the ceiling and the floors that every table is read against.

oracle     knows the truth: 100 on REC, POPE, PointQA, Visual7W and VQA (where some answer has four annotators behind it),
           all points on MME.
chance     the truth of another example of the same task: right in form and in frequencies, blind to image and question.
majority   always the most frequent answer of its kind of question; for REC the middle one of all boxes.
mute       says nothing: 0, except on POPE, whose official parser takes silence for a yes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np

from commvlm.data.boxes import DECIMALS, PadSquare, format_boxes, format_points, parse_boxes
from commvlm.data.example import BOXES, POINTS, Example, Turn

from .metrics import approximate_tokenize, cider_d, vqa_accuracy
from .run import Answerer, image_size

CIDER_TASKS = ("caption", "reg")


def mute(examples: Sequence[Example]) -> list[str]:
    """The empty answer to everything."""
    return ["" for _ in examples]


def oracle(examples: Sequence[Example]) -> Answerer:
    """Answers what is true of `examples`, boxes through the codec.

    VQA: the reference that scores best. Captions and REG: of each one's references the one with the highest CIDEr-D
    against all of them (itself among them), document frequencies from these examples: the most that copying a reference
    can reach, which is not CIDEr's maximum of 1000, since references differ among each other.
    Raises ValueError, when asked, for an example it was not given.
    """
    return _look_up(true_texts(examples))


def chance(examples: Sequence[Example], *, seed: int = 0) -> Answerer:
    """The truths of `examples`, dealt out anew among those of one task."""
    rng = np.random.default_rng(seed)
    truths = true_texts(examples)
    dealt: dict[tuple[str, str], str] = {}
    for task in sorted({task for task, _ in truths}):
        keys = [key for key in truths if key[0] == task]
        order = rng.permutation(len(keys))
        dealt |= {key: truths[keys[int(at)]] for key, at in zip(keys, order, strict=True)}
    return _look_up(dealt)


def majority(examples: Sequence[Example]) -> Answerer:
    """The most frequent true answer of each kind of question in `examples` (the training split, to be fair).

    A kind is a task, for VQA a question type. For REC it is the median of each corner in the padded square. A kind that
    `examples` lack gets the empty answer.
    """
    texts: dict[tuple[str, str], list[str]] = {}
    for example, text in zip(examples, true_texts(examples).values(), strict=True):
        texts.setdefault(_kind(example), []).append(text)
    common = {kind: _middle(said) if kind[0] == "rec" else _most_frequent(said) for kind, said in texts.items()}
    return lambda asked: [common.get(_kind(example), "") for example in asked]


def true_texts(examples: Sequence[Example]) -> dict[tuple[str, str], str]:
    """(task, id) -> the text of the true answer, in the examples' order."""
    texts = {(example.task, example.id): _true_text(example) for example in examples}
    if len(texts) != len(examples):
        raise ValueError(f"{len(examples)} examples have only {len(texts)} distinct ids: ids must be unique in a task")
    for task in CIDER_TASKS:
        texts |= _best_references([example for example in examples if example.task == task])
    return texts


def _true_text(example: Example) -> str:
    turn = example.turns[-1]
    if example.task == "vqa" and example.references:
        return max(example.references, key=lambda text: vqa_accuracy(text, example.references))
    return turn.answer if not (turn.answer_boxes or turn.answer_points) else _with_places(turn, example)


def _with_places(turn: Turn, example: Example) -> str:
    """The answer with its slots filled."""
    if example.image is None:
        raise ValueError(f"{example.task} {example.id}: its answer has boxes but it has no image to place them in")
    geometry = PadSquare(*image_size(example.image))
    text = _filled(turn.answer, BOXES, [format_boxes(group, geometry) for group in turn.answer_boxes])
    return _filled(text, POINTS, [format_points(group, geometry) for group in turn.answer_points])


def _filled(text: str, slot: str, said: Sequence[str]) -> str:
    first, *rest = text.split(slot)
    return first + "".join(words + after for words, after in zip(said, rest, strict=True))


def _best_references(examples: Sequence[Example]) -> dict[tuple[str, str], str]:
    """Of each example's references the one with the highest CIDEr-D, the first among equals."""
    if not examples:
        return {}
    texts = [example.references or (example.turns[-1].answer,) for example in examples]
    tokens = [approximate_tokenize(references) for references in texts]
    most = max(len(references) for references in texts)
    ciders = np.stack(
        [cider_d([said[k] if k < len(said) else "" for said in tokens], tokens).per_image for k in range(most)]
    )
    best = ciders.argmax(axis=0)
    return {
        (example.task, example.id): references[int(at)]
        for example, references, at in zip(examples, texts, best, strict=True)
    }


def _look_up(texts: dict[tuple[str, str], str]) -> Answerer:
    def answer(examples: Sequence[Example]) -> list[str]:
        unknown = next((e for e in examples if (e.task, e.id) not in texts), None)
        if unknown is not None:
            raise ValueError(f"no answer is known to {unknown.task} {unknown.id}: it was not among the examples given")
        return [texts[example.task, example.id] for example in examples]

    return answer


def _kind(example: Example) -> tuple[str, str]:
    if example.task == "vqa" and "question_type" in example.facts:
        return example.task, str(example.facts["question_type"])
    return example.task, ""


def _most_frequent(texts: Sequence[str]) -> str:
    """The first one met among equals."""
    return Counter(texts).most_common(1)[0][0]


def _middle(texts: Sequence[str]) -> str:
    boxes = [box for text in texts for group in parse_boxes(text) for box in group]
    if not boxes:
        return ""
    corners = (median(corner) for corner in zip(*boxes, strict=True))
    return f"[{','.join(f'{corner:.{DECIMALS}f}' for corner in corners)}]"
