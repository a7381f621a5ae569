"""Attention over packed rows: several images' dialogues in one row, each branch seeing its own prefix and itself alone.

A packed row is described by its segments: for each image in turn, the length of the shared prefix (system text, image) and of
every branch (a question with its answer) behind it. A token may look at what stands before it in its own branch and in the
prefix of that branch; nothing passes between branches or between images. With p tokens of prefix and k branches of n, a dense
causal mask costs (p + k n)^2, and more for every further image of the row; here it is at most p^2 / 2 + 2 k n p an image.

Three attentions read such a row, with the same result: "shared-prefix" (two calls of SDPA an image, on any device),
FlexAttention with a block mask ("flex_attention", meant for GPUs), and a dense mask ("sdpa", "eager"), the plainest and the
dearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface

PACKED = "packed"
"""What a recipe says for whichever attention over packed rows suits the device."""
NAME = "shared-prefix"
FLEX = "flex_attention"

Segments = Sequence[Sequence[int]]
"""[image][length of the prefix, lengths of the branches...], in the order of the row."""


def available(attention: str) -> str:
    """The attention itself, or for "packed" the one that suits this machine: FlexAttention on a GPU, else shared-prefix."""
    if attention != PACKED:
        return attention
    return FLEX if torch.cuda.is_available() else NAME


def packs(attention: str) -> bool:
    """Whether an attention wants a batch's rows joined into one."""
    return attention in (PACKED, NAME, FLEX)


@dataclass(frozen=True)
class Tail:
    """Some branches behind one prefix. length: their tokens. scores: (length, prefix + length), added to their scores."""

    length: int
    scores: Tensor


@dataclass(frozen=True)
class Piece:
    """One image's part of a row. prefix: tokens that are shared, all where there is but one branch. tails: the others."""

    prefix: int
    tails: list[Tail]

    @property
    def lengths(self) -> list[int]:
        """Of the prefix and of every tail."""
        return [self.prefix, *(tail.length for tail in self.tails)]


def look_rule(segments: Segments, device: torch.device) -> Callable[..., Tensor]:
    """(batch, head, query, key), as places in the row, -> bool: whether the query may look at the key."""
    homes, roots, first = [], [], 0
    for image in segments:
        for number, length in enumerate(image, start=first):
            homes += [number] * length
            roots += [first] * length
        first += len(image)
    home, root = (torch.tensor(numbers, device=device) for numbers in (homes, roots))

    def may_look(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((home[key] == home[query]) | (home[key] == root[query]))

    return may_look


def dense_mask(segments: Segments, device: torch.device) -> Tensor:
    """(1, 1, n, n) bool, True where the query (row) may look at the key (column)."""
    places = torch.arange(sum(map(sum, segments)), device=device)
    return look_rule(segments, device)(0, 0, places[:, None], places[None, :])[None, None]


def block_mask(segments: Segments, device: torch.device) -> BlockMask:
    """The same as a FlexAttention mask, whose empty blocks are never computed."""
    length = sum(map(sum, segments))
    rule = look_rule(segments, device)
    return create_block_mask(rule, None, None, length, length, device=device, _compile=device.type == "cuda")  # type: ignore[arg-type]


def pieces(segments: Segments, device: torch.device, dtype: torch.dtype) -> list[Piece]:
    """The row's images, with what the branches' tokens add to their scores, made once for all layers. dtype: of the queries.

    Branches are taken together up to the prefix's length: more would look at each other's masked scores too much, fewer copy
    the prefix's keys too often.
    """
    dtype = scores_in(device, dtype)
    found = []
    for prefix, *branches in segments:
        if len(branches) < 2:
            found.append(Piece(prefix + sum(branches), []))
            continue
        tails: list[list[int]] = [[]]
        for branch in branches:
            if tails[-1] and sum(tails[-1]) + branch > prefix:
                tails.append([])
            tails[-1].append(branch)
        found.append(Piece(prefix, [_tail(prefix, tail, device, dtype) for tail in tails]))
    return found


def _tail(prefix: int, branches: list[int], device: torch.device, dtype: torch.dtype) -> Tail:
    hidden = ~dense_mask([[prefix, *branches]], device)[0, 0, prefix:]
    scores = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return Tail(sum(branches), scores)


@torch.compiler.disable  # its loop over pieces would be compiled anew for every batch
def shared_prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, pieces: Sequence[Piece] | None = None, dropout: float = 0.0, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (1, h, n, d), key and value (1, g, n, d), g dividing h -> output (1, n, h, d). Exact; dropout is not offered."""
    if dropout:
        raise ValueError("shared-prefix attention has no dropout: set the language model's attention_dropout to 0")
    if pieces is None:
        raise ValueError("shared-prefix attention reads packed rows: give `segments`, or take attention 'sdpa'")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    dtype = query.dtype
    query, key, value = (t.to(scores_in(t.device, dtype)) for t in (query, key, value))
    # Split, not sliced: the gradient of a slice is as long as the row, so those of many images would be quadratic.
    parts = zip(
        *(t.split([n for piece in pieces for n in piece.lengths], dim=2) for t in (query, key, value)), strict=True
    )
    out = []
    with torch.autocast(query.device.type, enabled=False):
        for piece in pieces:
            q, k, v = next(parts)
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
            for tail in piece.tails:
                q, own_k, own_v = next(parts)
                keys, values = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
                out.append(
                    F.scaled_dot_product_attention(q, keys, values, attn_mask=tail.scores.to(q.dtype), scale=scaling)
                )
    return torch.cat(out, dim=2).to(dtype).transpose(1, 2).contiguous(), None


def scores_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What scores are computed in: on a CPU, where half precision is slower than fp32, that."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype


AttentionInterface.register(NAME, shared_prefix_attention)  # pyright: ignore[reportArgumentType]
