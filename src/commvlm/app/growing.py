"""Answers that grow together, a token a step: others join between two steps, and one that has ended leaves.

Rows are aligned at their right end. Those that join are read apart, behind their image's prefix, and their keys and values
are then laid beside those of the rest; what is shorter gets room on its left that nobody looks at.

    | prefix A, rest of question 1, answer so far
    |    room, prefix B, rest of question 2, ans.      <- joined later
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..model import CommForConditionalGeneration


@dataclass(frozen=True)
class Prompt:
    """ids (n,): of the whole prompt, image placeholders included. image: which one it shows, None for none."""

    ids: Tensor
    image: Hashable | None
    features: Tensor | None
    """(N, hidden): the image's visual tokens."""


@dataclass(frozen=True)
class Sampling:
    """Drawn instead of the likeliest token: temperature above 0, of the likeliest tokens that make up top_p in [0, 1], at
    least of one."""

    temperature: float
    top_p: float
    generator: torch.Generator
    """Of the CPU: a seed gives the same draws beside whatever other rows."""

    def pick(self, logits: Tensor) -> int:
        """(vocabulary,) -> an id."""
        scores = logits.double().cpu()
        # From the highest down: however small the temperature, the likeliest token's score stays 0.
        chances, ids = ((scores - scores.max()) / self.temperature).softmax(-1).sort(descending=True)
        left_out = chances.cumsum(-1) - chances >= self.top_p
        left_out[0] = False
        chances[left_out] = 0
        return int(ids[torch.multinomial(chances, 1, generator=self.generator)])


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far. most: of how many tokens at most."""

    prompt: Prompt
    most: int
    sampling: Sampling | None = None
    said: list[int] = field(default_factory=list)
    """ids, the end token left out."""
    finish: str | None = None
    """None while it grows; "stop": it has said its end token, "length": `most` tokens, "left": see `Growing.leave`."""

    def take(self, token: int, *, ends: frozenset[int]) -> None:
        if token in ends:
            self.finish = "stop"
            return
        self.said.append(token)
        if len(self.said) >= self.most:
            self.finish = "length"


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

    def keep(self, rows: Tensor, *, skip: int) -> None:
        """rows (b,): those that go on. skip: places at the left that none of them uses."""
        length = self.get_seq_length() - skip
        self._keys, self._values = self._keys[rows, :, skip:], self._values[rows, :, skip:]
        self._show(length)

    def join(self, other: RoomyLayer, *, room: int) -> None:
        """Rows of another layer below one's own, right ends side by side. room: for so many tokens to come."""
        length = max(self.get_seq_length(), other.get_seq_length())
        self._keys = _beside(self.keys, other.keys, length=length, room=room)  # type: ignore[arg-type]
        self._values = _beside(self.values, other.values, length=length, room=room)  # type: ignore[arg-type]
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]


def _with_room(tensor: Tensor, rows: Tensor, room: int) -> Tensor:
    """(images, heads, n, d) -> (b, heads, n + room, d), each row beginning as its image's."""
    _, heads, length, width = tensor.shape
    roomy = tensor.new_empty(len(rows), heads, length + room, width)
    roomy[:, :, :length] = tensor[rows]
    return roomy


def _beside(first: Tensor, second: Tensor, *, length: int, room: int) -> Tensor:
    """(a, heads, n, d) and (b, heads, m, d) -> (a + b, heads, length + room, d)."""
    rows, heads, _, width = first.shape
    both = first.new_empty(rows + len(second), heads, length + room, width)
    for place, part in ((both[:rows], first), (both[rows:], second)):
        start = length - part.shape[2]
        place[:, :, :start] = 0  # masked, but a NaN times 0 would be one
        place[:, :, start:length] = part
    return both


class Growing:
    """Rows, their keys and values, and what each reads next. ends: ids of end tokens; never: ids (n,) that are never said."""

    def __init__(self, model: CommForConditionalGeneration, *, ends: frozenset[int], never: Tensor) -> None:
        self.model, self.ends, self.never = model, ends, never
        self.rows: list[Row] = []
        self._cache = DynamicCache()
        self._mask = self._positions = self._ids = torch.empty(0)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row], cache: DynamicCache, ids: Tensor, mask: Tensor) -> None:
        """Reads what is left of the rows' prompts, and gives each its first token.

        cache: of RoomyLayers that hold the rows' prefixes; ids (b, n) and mask (b, n): the rests, left-padded.
        """
        length = cache.get_seq_length()
        mask = torch.cat([mask.new_ones(len(rows), length), mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, length:]
        new = Growing(self.model, ends=self.ends, never=self.never)
        new.rows, new._cache, new._ids, new._mask, new._positions = list(rows), cache, ids, mask, positions
        new.step()
        if not new.rows:
            return
        if not self.rows:
            self.rows, self._cache, self._ids = new.rows, new._cache, new._ids
            self._mask, self._positions = new._mask, new._positions
            return
        self._lay_beside(new)

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row; those that have ended are gone from `rows` then."""
        logits = self.model(
            input_ids=self._ids, attention_mask=self._mask, position_ids=self._positions, past_key_values=self._cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1].index_fill(-1, self.never, -torch.inf)  # fmt: skip
        token = logits.argmax(dim=-1)
        for place, row in enumerate(self.rows):
            if row.sampling is not None:
                token[place] = row.sampling.pick(logits[place])
        for row, said in zip(self.rows, token.tolist(), strict=True):
            row.take(said, ends=self.ends)
        self._ids, self._positions = token[:, None], self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._keep_growing()

    def leave(self, rows: Sequence[Row]) -> None:
        """Stops rows before their end."""
        for row in rows:
            row.finish = row.finish or "left"
        self._keep_growing()

    def _keep_growing(self) -> None:
        kept = [place for place, row in enumerate(self.rows) if row.finish is None]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            self._cache = DynamicCache()
            return
        places = torch.tensor(kept, device=self._mask.device)
        mask = self._mask[places]
        skip = int(mask.any(dim=0).nonzero()[0])
        for layer in self._cache.layers:
            layer.keep(places, skip=skip)  # type: ignore[attr-defined]
        self._ids, self._positions, self._mask = self._ids[places], self._positions[places], mask[:, skip:]

    def _lay_beside(self, new: Growing) -> None:
        rows = [*self.rows, *new.rows]
        room = max(row.most - len(row.said) for row in rows)
        for mine, other in zip(self._cache.layers, new._cache.layers, strict=True):
            mine.join(other, room=room)  # type: ignore[attr-defined,arg-type]
        length = max(self._mask.shape[1], new._mask.shape[1])
        self._mask = torch.cat([_widened(self._mask, length), _widened(new._mask, length)])
        self._ids = torch.cat([self._ids, new._ids])
        self._positions = torch.cat([self._positions, new._positions])
        self.rows = rows


def _widened(mask: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))
