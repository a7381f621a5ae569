"""Greedy answers to many questions at once: what they begin with is read once an image, and branched for every question.

Prompts about one image begin alike: system text, image, the template's first words. The language model reads that prefix
once for each distinct image of a batch; its keys and values are then copied to the image's questions, whose own rests are
read in one left-padded batch, and all answers grow together (see `growing`).

    prefix of image A | padding, rest of question 1, answer
                      | padding, rest of question 2, answer
    prefix of image B | ...

Every token sees what it would see in a prompt of its own, at the same position, so the answers are those of asking one by
one (to the token in fp32). Models whose cache is of another kind (sliding windows, state spaces), that take no position ids,
or whose generation config changes the scores (penalties, forced tokens) are asked by the library's `generate`, whole prompts
at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..model import CommForConditionalGeneration
from .growing import Growing, Prompt, RoomyLayer, Row

__all__ = ["Decoder", "Growing", "Prompt", "Row"]

PLAIN = {
    "repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "sequence_bias": (None,), "guidance_scale": (None, 1.0), "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,), "constraints": (None,),
}  # fmt: skip
"""Settings of a generation config that change greedy answers, and the values at which they do not."""


class Decoder:
    """Prompts -> ids of their answers, greedily. At most max_new_tokens each; pad: any id, never looked at."""

    def __init__(self, model: CommForConditionalGeneration, *, max_new_tokens: int, pad: int) -> None:
        self.model, self.max_new_tokens, self.pad = model, max_new_tokens, pad
        self.device = next(model.parameters()).device
        takes = inspect.signature(model.model.language_model.forward).parameters
        said = {} if model.generation_config is None else model.generation_config.to_dict()
        usual = all(said[name] in values for name, values in PLAIN.items() if name in said)
        self.shares_prefixes = usual and "position_ids" in takes and "past_key_values" in takes

    @torch.inference_mode()
    def settle(self) -> None:
        """Tells at once, by reading one token, whether the model shares prefixes; otherwise the first question tells."""
        if self.shares_prefixes:
            read = self.model.model(input_ids=torch.full((1, 1), self.pad, device=self.device), use_cache=True)
            self.shares_prefixes = _plain(read.past_key_values)

    def _ids(self, setting: str) -> Tensor:
        """The ids of a setting of the model's generation config: one, several, or none."""
        config = {} if self.model.generation_config is None else self.model.generation_config.to_dict()
        found = config.get(setting)
        listed = [] if found is None else [found] if isinstance(found, int) else list(found)
        return torch.tensor(listed, dtype=torch.long, device=self.device)

    def start(self) -> Growing:
        """No answers yet; see `begin`."""
        return Growing(
            self.model, ends=frozenset(self._ids("eos_token_id").tolist()), never=self._ids("suppress_tokens")
        )

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Answers in the prompts' order, their end token left out. All prompts are one batch."""
        rows, growing = [Row(prompt, self.max_new_tokens) for prompt in prompts], self.start()
        self.begin(growing, rows)
        while growing.rows:
            growing.step()
        return [row.said for row in rows]

    @torch.inference_mode()
    def begin(self, growing: Growing, rows: Sequence[Row]) -> None:
        """Reads the rows' prompts, those that begin alike together, and lets them grow with the others from there on.

        Rows of a model that does not share prefixes are asked whole, and have ended afterwards.
        """
        if not self.shares_prefixes:
            self._whole(rows)
            return
        alike: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            alike.setdefault(self._beginning(row.prompt), []).append(row)
        for group in alike.values():
            self._join(growing, group)

    def _beginning(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt's ids up to its image's last placeholder; of one without an image the first."""
        shown = (prompt.ids == self.model.config.image_token_id).nonzero()
        return tuple(prompt.ids[: int(shown[-1]) + 1 if len(shown) else 1].tolist())

    def _join(self, growing: Growing, rows: Sequence[Row]) -> None:
        prompts = [row.prompt for row in rows]
        length = _shared([prompt.ids for prompt in prompts])
        if length < len(self._beginning(prompts[0])):  # nothing is left to read behind the image
            self._whole(rows)
            return
        images = list(dict.fromkeys(prompt.image for prompt in prompts))
        shown = [next(p.features for p in prompts if p.image == image) for image in images]
        read = self.model.model(
            input_ids=prompts[0].ids[:length].to(self.device).expand(len(images), -1), use_cache=True,
            **self._image_inputs(shown),
        )  # fmt: skip
        if not _plain(read.past_key_values):
            self.shares_prefixes = False
            self._whole(rows)
            return
        ids, mask = _left_padded([prompt.ids[length:].to(self.device) for prompt in prompts], self.pad)
        room = ids.shape[1] + max(row.most for row in rows)
        places = torch.tensor([images.index(prompt.image) for prompt in prompts], device=self.device)
        cache = DynamicCache()
        for layer in read.past_key_values.layers:
            cache.layers.append(RoomyLayer(layer.keys, layer.values, rows=places, room=room))
        growing.join(rows, cache, ids, mask)

    def _image_inputs(self, features: Sequence[Tensor | None]) -> dict[str, Any]:
        shown = [tokens for tokens in features if tokens is not None]
        return {"mm_encoder_outputs": {"image": _Features(shown)}} if shown else {}

    def _whole(self, rows: Sequence[Row]) -> None:
        """Left-padded whole prompts through the library's `generate`; rows with and without an image apart."""
        for shows_image in (True, False):
            alike = [row for row in rows if (row.prompt.features is not None) == shows_image]
            if alike:
                self._generate(alike)

    def _generate(self, rows: Sequence[Row]) -> None:
        prompts = [row.prompt for row in rows]
        ids, mask = _left_padded([prompt.ids.to(self.device) for prompt in prompts], self.pad)
        generate: Any = self.model.generate  # pyright: ignore[reportAttributeAccessIssue]
        embeds = self.model.get_input_embeddings()(ids)
        shown = [prompt.features for prompt in prompts if prompt.features is not None]
        if shown:
            embeds = self.model.model.write_images(embeds, ids, torch.cat(shown))
        # With the ids beside them, penalties see the prompt as well.
        said = generate(
            input_ids=ids, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max(row.most for row in rows),
            do_sample=False, num_beams=1,
        )  # fmt: skip
        ends = frozenset(self._ids("eos_token_id").tolist())
        for row, tokens in zip(rows, said[:, ids.shape[1] :].tolist(), strict=True):
            for token in tokens:
                if row.finish is None:
                    row.take(token, ends=ends)


@dataclass(frozen=True)
class _Features:
    """What `get_image_features` gives, of images that were read before."""

    pooler_output: Sequence[Tensor]


def _plain(cache: Any) -> bool:
    """Whether every layer keeps all keys and values of the prefix, as nothing but attention over all of it does."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """ids, mask (b, n) int64."""
    size = len(rows), max(map(len, rows))
    ids = torch.full(size, pad, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, size[1] - len(row) :], mask[place, size[1] - len(row) :] = row, 1
    return ids, mask


def _shared(prompts: Sequence[Tensor]) -> int:
    """How many ids all prompts begin with, one id of each left."""
    first, length = prompts[0], min(map(len, prompts)) - 1
    for ids in prompts[1:]:
        differs = (ids[:length] != first[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
    return length
