"""Our own instruction variants per task: a seeded choice in training, the first one in evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .example import IMAGE, Example
from .prompts import PROMPTS

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Vicuna v1.1's system message."""

CONTENT = "{content}"

# What the shipped tiny language model was pretrained on: another word here is one that it has never seen.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "rec": (
        "Where is {content}? Answer with its box.",
        "Where is {content}?",
        "where is {content}?",
        "Give the box of {content}.",
        "Locate {content} in the image.",
    ),
    "reg": (
        "Describe the object at {content} in a short phrase.",
        "What is at {content}?",
        "what is in {content}?",
        "Give a short phrase for the region {content}.",
    ),
    "vqa": (
        "{content} Answer in one word.",
        "{content}",
        "Answer the question in one word. {content}",
    ),
    "pope": (
        "{content} Answer yes or no.",
        "{content}",
        "Answer yes or no. {content}",
    ),
    "caption": (
        "Describe the image in one sentence.",
        "Give a short caption of the image.",
        "What does the image show?",
        "describe the image",
    ),
}


SETS = ("short", "wide")
"""short: TEMPLATES, and PROMPTS for tasks that it does not have. wide: PROMPTS. Both begin with the same ones."""


def variants(task: str, prompts: str = "short") -> tuple[str, ...]:
    """A task's variants in one of SETS. Raises KeyError for a task without any."""
    return TEMPLATES[task] if prompts == "short" and task in TEMPLATES else PROMPTS[task]


def instruct(example: Example, rng: np.random.Generator | None = None, *, prompts: str = "short") -> Example:
    """The raw example as an instruction: its first turn gets the `<image>` slot and one template of its task.

    rng: picks the variant (training); None takes the first one (evaluation). Examples of task "dialogue" come back
    unchanged. Raises KeyError for a task without templates.
    """
    if example.task == "dialogue":
        return example
    known = variants(example.task, prompts)
    variant = known[0] if rng is None else known[int(rng.integers(len(known)))]
    first, *rest = example.turns
    question = variant.replace(CONTENT, first.question)
    if example.image is not None:
        question = f"{IMAGE}\n{question}"
    return replace(example, turns=(replace(first, question=question), *rest))
