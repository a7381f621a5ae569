"""Symbolic scenes: patch tokens that say in the language model's own words what is there, and dialogues about them.

A patch's embedding is the sum of the word embeddings of the colour and category that cover it, weighted by coverage, a
background vector, a position code, on half of the scenes a hint of how far the object's edges are, and noise. It favours
no encoder: a visual branch later has to learn the alignment, not the grammar.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ...data.boxes import PadSquare
from ...data.dialogue import render
from ...data.example import IMAGE, Example, Turn
from ...data.templates import instruct
from ..sayings import Saying, say
from ..scene import SIDE, Scene

GRID = 8
PATCH = SIDE // GRID


SQUARE = PadSquare(SIDE, SIDE)
SOMEWHERE = Path("scene")
"""Stands for an image that is never drawn."""


def prefix_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that every question about an image shares, up to the newline after the image."""
    head, _, _ = parted(Turn("", ""), "caption", tokenizer, rng=None)
    return tokenizer.encode(head.replace(IMAGE, IMAGE * GRID**2), add_special_tokens=False)


def parted(
    turn: Turn, task: str, tokenizer: PreTrainedTokenizerFast, *, rng: np.random.Generator | None
) -> tuple[str, str, str]:
    """The dialogue about a raw turn, as `data.dialogue` renders it, in three: up to the image's newline, the question up to
    "ASSISTANT:", the answer. rng draws the template."""
    example = instruct(Example("saying", task, SOMEWHERE, (turn,)), rng)
    said = render(example, geometry=SQUARE, eos=str(tokenizer.eos_token), bos=str(tokenizer.bos_token))
    (start, end), head = said.spans[0], said.text.index(IMAGE) + len(IMAGE) + 1
    return said.text[:head], said.text[head:start], said.text[start:end]


def coverage(scene: Scene) -> np.ndarray:
    """(objects, 64): the share of each patch, row-major, that each object's box covers."""
    edges = np.arange(GRID) * PATCH
    out = np.empty((len(scene.things), GRID * GRID), dtype=np.float32)
    for i, thing in enumerate(scene.things):
        x1, y1, x2, y2 = thing.box
        w = np.clip(np.minimum(edges + PATCH, x2) - np.maximum(edges, x1), 0, None) / PATCH
        h = np.clip(np.minimum(edges + PATCH, y2) - np.maximum(edges, y1), 0, None) / PATCH
        out[i] = (h[:, None] * w[None, :]).reshape(-1)
    return out


def position_code(values: torch.Tensor, width: int) -> torch.Tensor:
    """Sine-cosine code of numbers in [0, 1]: (n,) -> (n, width), unit variance."""
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 5, width // 2)
    angles = values[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1) * 2**0.5


@dataclass(frozen=True)
class SymbolBatch:
    """scenes x questions as one row a scene. coverage: per scene (objects, 64). words: per scene (objects, 2) ids of colour
    and category. extents: per scene (objects, 4) boxes in [0, 1]. ids, labels: (scenes, questions, length). asked: per
    question the patches (64) that its answer depends on, or zeros; answer_at: index in the branch that predicts the
    first answer token; hint: whether the attention hint applies (1), or not (0).
    kinds: of every question, scene by scene."""

    coverage: list[np.ndarray]
    words: list[np.ndarray]
    extents: list[np.ndarray]
    ids: torch.Tensor
    labels: torch.Tensor
    asked: torch.Tensor
    answer_at: torch.Tensor
    hint: torch.Tensor
    kinds: list[str]


HINTED = ("rec", "reg", "presence", "color", "count")


def symbol_batch(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, *, questions: int, mix: dict[str, float],
    rng: np.random.Generator, difficulty: str,
) -> SymbolBatch:  # fmt: skip
    kinds = tuple(mix)
    weights = np.asarray(list(mix.values())) / sum(mix.values())
    sayings: list[Saying] = []
    owners: list[int] = []
    for s, scene in enumerate(scenes):
        while len(sayings) < questions * (s + 1):
            saying = say(scene, kinds[int(rng.choice(len(kinds), p=weights))], rng, difficulty)
            if saying is not None:
                sayings.append(saying)
                owners.append(s)
    sides = [parted(saying.turn, saying.task, tokenizer, rng=rng)[1:] for saying in sayings]
    asked_ids = tokenizer([q for q, _ in sides], add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([a for _, a in sides], add_special_tokens=False)["input_ids"]
    length = max(len(q) + len(a) for q, a in zip(asked_ids, answer_ids, strict=True))
    ids = torch.full((len(sides), length), tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType, reportCallIssue]
    labels = torch.full((len(sides), length), -100)
    covers = [coverage(scene) for scene in scenes]
    asked = torch.zeros(len(sides), GRID * GRID)
    for k, (q, a) in enumerate(zip(asked_ids, answer_ids, strict=True)):
        ids[k, : len(q) + len(a)] = torch.tensor(q + a)
        labels[k, len(q) : len(q) + len(a)] = torch.tensor(a)
        scene = scenes[owners[k]]
        for thing in sayings[k].things:
            asked[k] += torch.from_numpy(covers[owners[k]][scene.things.index(thing)])
    words = [_words(scene, tokenizer) for scene in scenes]
    extents = [np.asarray([t.box for t in scene.things], dtype=np.float32) / SIDE for scene in scenes]
    shape = (len(scenes), questions)
    return SymbolBatch(
        covers, words, extents,
        ids.view(*shape, length), labels.view(*shape, length), asked.view(*shape, -1),
        torch.tensor([len(q) - 1 for q in asked_ids]).view(shape),
        torch.tensor([float(s.kind in HINTED) for s in sayings]).view(shape),
        [s.kind for s in sayings],
    )  # fmt: skip


def _words(scene: Scene, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    def one(word: str) -> int:
        found = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(found) != 1:
            raise ValueError(f"the tokenizer has no single token for {word!r}")
        return found[0]

    return np.asarray([(one(t.color), one(t.category)) for t in scene.things])
