"""The micro world's tokenizer: byte-level BPE learned on its language, with the box coordinates as whole tokens.

A scene's boxes lie on a grid of two pixels in sixty-four, so 33 coordinates ("0.000", "0.031", ...) say all of them; they
are tokens of their own. Any other text, other coordinates included, falls back to pieces and bytes: nothing is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..data.templates import SYSTEM, TEMPLATES
from . import language
from .scene import COLORS, DIFFICULTIES, SIDE, sample_scene

COORDINATES = tuple(f"{round(v / SIDE, 3):.3f}" for v in range(0, SIDE + 1, 2))
SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
VOCABULARY = 640


def _corpus() -> Iterator[str]:
    yield from [SYSTEM + " USER: \n ASSISTANT: [ [ [ ] ]. ]? ]; yes no 1"] * 50
    for texts in TEMPLATES.values():
        for text in texts:
            yield from [text.replace("{content}", " the "), text.lower().replace("{content}", " the ")] * 50
    hard = DIFFICULTIES["hard"]
    for category in hard.categories:
        for form in (category, language.plural(category)):
            yield from [f" {form} {form}? {form}. {form}, Is there a {form} in the image?"] * 50
    for color in COLORS:
        yield from [f" {color} {color}, {color}. {color}?"] * 50
    yield from [" 0 1 2 3 4 5 6 7 8 9 yes no zero one two three four five"] * 50
    rng = np.random.default_rng(0)
    for index in range(1500):
        scene = sample_scene("train", index, "hard")
        yield from language.captions(scene, rng)
        for thing in scene.things:
            yield from language.expressions(scene, thing)
        for question in (language.color(scene, rng), language.count(scene, rng, "hard"), language.relation(scene, rng)):
            if question is not None:
                yield f"{question.text} {question.answer}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learns the tokenizer from the world's language; the same tokens every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=5,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken(c, normalized=False) for c in COORDINATES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
