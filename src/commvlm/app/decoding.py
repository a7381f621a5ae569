"""Greedy answers to many questions at once: what they begin with is read once an image, and branched for every question.

Prompts about one image begin alike: system text, image, the template's first words. The language model reads that prefix
once for each distinct image of a batch; its keys and values are then copied to the image's questions, whose own rests are
read in one left-padded batch, and all answers grow together. A row that has said its end token leaves the batch.

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
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..model import CommForConditionalGeneration

PLAIN = {
    "repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "sequence_bias": (None,), "guidance_scale": (None, 1.0), "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,), "constraints": (None,),
}  # fmt: skip
"""Settings of a generation config that change greedy answers, and the values at which they do not."""


@dataclass(frozen=True)
class Prompt:
    """ids (n,): of the whole prompt, image placeholders included. image: which one it shows, None for none."""

    ids: Tensor
    image: Hashable | None
    features: Tensor | None
    """(N, hidden): the image's visual tokens."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room for the tokens to come: a step writes its own and copies nothing."""

    def __init__(self, keys: Tensor, values: Tensor, *, rows: Tensor, room: int) -> None:
        """keys, values (images, heads, n, d); rows (b,): which of them each row begins with."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._keys, self._values = (_with_room(tensor, rows, room) for tensor in (keys, values))
        self._show(keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        self._keys[:, :, start:end], self._values[:, :, start:end] = key_states, value_states
        self._show(end)
        return self.keys, self.values  # pyright: ignore[reportReturnType]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]


def _with_room(tensor: Tensor, rows: Tensor, room: int) -> Tensor:
    """(images, heads, n, d) -> (b, heads, n + room, d), each row beginning as its image's."""
    _, heads, length, width = tensor.shape
    roomy = tensor.new_empty(len(rows), heads, length + room, width)
    roomy[:, :, :length] = tensor[rows]
    return roomy


class Decoder:
    """Prompts -> ids of their answers, greedily. At most max_new_tokens each; pad: any id, never looked at."""

    def __init__(self, model: CommForConditionalGeneration, *, max_new_tokens: int, pad: int) -> None:
        self.model, self.max_new_tokens, self.pad = model, max_new_tokens, pad
        self.device = next(model.parameters()).device
        takes = inspect.signature(model.model.language_model.forward).parameters
        said = {} if model.generation_config is None else model.generation_config.to_dict()
        usual = all(said[name] in values for name, values in PLAIN.items() if name in said)
        self.shares_prefixes = usual and "position_ids" in takes and "past_key_values" in takes

    def _ids(self, setting: str) -> Tensor:
        """The ids of a setting of the model's generation config: one, several, or none."""
        config = {} if self.model.generation_config is None else self.model.generation_config.to_dict()
        found = config.get(setting)
        listed = [] if found is None else [found] if isinstance(found, int) else list(found)
        return torch.tensor(listed, dtype=torch.long, device=self.device)

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Answers in the prompts' order, their end token left out. All prompts are one batch."""
        answers: list[list[int]] = [[] for _ in prompts]
        for step in self.steps(prompts):
            for row, ids in step.items():
                answers[row] += ids
        return answers

    @torch.inference_mode()
    def steps(self, prompts: Sequence[Prompt]) -> Iterator[dict[int, list[int]]]:
        """The same answers as they grow: at each step, the prompts' places that go on and their new ids. Where whole prompts
        go through `generate`, all is one step."""
        length = self._shared(prompts) if self.shares_prefixes else 0
        cache = self._prefixes(prompts, length) if length else None
        if cache is None:
            yield dict(enumerate(self._whole(prompts)))
        else:
            yield from self._grow(cache, [prompt.ids[length:].to(self.device) for prompt in prompts], length)

    def _prefixes(self, prompts: Sequence[Prompt], length: int) -> Cache | None:
        """Keys and values of the first `length` ids, a row a prompt, read once an image. None for a cache of another kind."""
        images = list(dict.fromkeys(prompt.image for prompt in prompts))
        shown = [next(p.features for p in prompts if p.image == image) for image in images]
        read = self.model.model(
            input_ids=prompts[0].ids[:length].to(self.device).expand(len(images), -1), use_cache=True,
            **self._image_inputs(shown),
        )  # fmt: skip
        if not _plain(read.past_key_values):
            self.shares_prefixes = False
            return None
        rows = torch.tensor([images.index(prompt.image) for prompt in prompts], device=self.device)
        room = max(len(prompt.ids) for prompt in prompts) - length + self.max_new_tokens
        cache = DynamicCache()
        for layer in read.past_key_values.layers:
            cache.layers.append(RoomyLayer(layer.keys, layer.values, rows=rows, room=room))
        return cache

    def _shared(self, prompts: Sequence[Prompt]) -> int:
        """How many ids all prompts begin with, every image among them and one id of each left; 0 where they do not."""
        first = prompts[0].ids
        length = min(len(prompt.ids) for prompt in prompts) - 1
        for prompt in prompts[1:]:
            differs = (prompt.ids[:length] != first[:length]).nonzero()
            length = int(differs[0]) if len(differs) else length
        image_id = self.model.config.image_token_id
        whole = all(not (prompt.ids[length:] == image_id).any() for prompt in prompts)
        one_kind = len({prompt.image is None for prompt in prompts}) == 1
        return length if whole and one_kind else 0

    def _image_inputs(self, features: Sequence[Tensor | None]) -> dict[str, Any]:
        shown = [tokens for tokens in features if tokens is not None]
        return {"mm_encoder_outputs": {"image": _Features(shown)}} if shown else {}

    def _grow(self, cache: Cache, rests: Sequence[Tensor], length: int) -> Iterator[dict[int, list[int]]]:
        """Reads the rests behind a prefix of `length`, then a token a row and step: the rows that go on, and theirs."""
        ids, mask = _left_padded(rests, self.pad)
        mask = torch.cat([mask.new_ones(len(rests), length), mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, length:]
        alive = list(range(len(rests)))
        ends, never = self._ids("eos_token_id"), self._ids("suppress_tokens")
        for step in range(self.max_new_tokens):
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            ).logits  # fmt: skip
            token = logits[:, -1].index_fill(-1, never, -torch.inf).argmax(dim=-1)
            goes_on = ~torch.isin(token, ends)
            said = zip(alive, token.tolist(), goes_on.tolist(), strict=True)
            yield {row: [id_] for row, id_, on in said if on}
            kept = goes_on.nonzero()[:, 0]
            if step + 1 == self.max_new_tokens or not len(kept):
                return
            if len(kept) < len(alive):
                cache.batch_select_indices(kept)
                token, mask, positions = token[kept], mask[kept], positions[kept]
                alive = [alive[row] for row in kept.tolist()]
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    def _whole(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Left-padded whole prompts through the library's `generate`."""
        ids, mask = _left_padded([prompt.ids.to(self.device) for prompt in prompts], self.pad)
        generate: Any = self.model.generate  # pyright: ignore[reportAttributeAccessIssue]
        embeds = self.model.get_input_embeddings()(ids)
        shown = [prompt.features for prompt in prompts if prompt.features is not None]
        if shown:
            embeds = self.model.model.write_images(embeds, ids, torch.cat(shown))
        # With the ids beside them, penalties see the prompt as well.
        said = generate(
            input_ids=ids,
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
        )  # fmt: skip
        ends = set(self._ids("eos_token_id").tolist())
        return [_until(row, ends) for row in said[:, ids.shape[1] :].tolist()]


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


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first end token."""
    return list(ids[: next((k for k, token in enumerate(ids) if token in ends), len(ids))])
