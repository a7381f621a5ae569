"""Attention over packed rows, against masks written out by hand; nothing of a model."""

from __future__ import annotations

import pytest
import torch

from commvlm.model.attention import available, block_mask, dense_mask, packs, pieces, shared_prefix_attention

SEGMENTS = [[5, 3, 2, 4], [3, 2], [4, 1, 6], [0, 2, 2]]
"""The second image has one branch; the last has nothing to share."""
CPU = torch.device("cpu")


def by_hand(segments: list[list[int]]) -> torch.Tensor:
    """Token by token: who stands where, and who may look at whom."""
    tokens = [(i, b) for i, image in enumerate(segments) for b, length in enumerate(image) for _ in range(length)]
    return torch.tensor(
        [[k <= q and i == j and b in (0, a) for k, (j, b) in enumerate(tokens)] for q, (i, a) in enumerate(tokens)]
    )


def test_masks_are_those_written_out_by_hand():
    looks = by_hand(SEGMENTS)
    assert torch.equal(dense_mask(SEGMENTS, CPU)[0, 0], looks)
    mask = block_mask(SEGMENTS, CPU)
    places = torch.arange(len(looks))
    assert torch.equal(mask.mask_mod(0, 0, places[:, None], places[None, :]), looks)  # type: ignore[arg-type]
    assert mask.shape == (1, 1, *looks.shape)


def test_a_block_mask_leaves_other_images_blocks_out():
    """Four images of 256 tokens: of 8 x 8 blocks of 128, only those on and below each image's own diagonal are computed."""
    blocks = block_mask([[128, 64, 64]] * 4, CPU).to_dense()[0, 0]
    expected = torch.block_diag(*[torch.ones(2, 2).tril()] * 4)
    assert torch.equal(blocks.float(), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_and_gradients_are_those_of_a_softmax_written_out(groups):
    torch.manual_seed(0)
    n, heads, d = sum(map(sum, SEGMENTS)), 4, 8
    q = torch.randn(1, heads, n, d, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, heads // groups, n, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, _ = shared_prefix_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, pieces=pieces(SEGMENTS, CPU, torch.float64)
    )
    keys, values = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = (0.3 * q @ keys.transpose(-1, -2)).masked_fill(~by_hand(SEGMENTS), float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_what_it_cannot_do_is_refused():
    t = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="no dropout"):
        shared_prefix_attention(torch.nn.Module(), t, t, t, None, scaling=1.0, pieces=[], dropout=0.1)
    with pytest.raises(ValueError, match="packed rows"):
        shared_prefix_attention(torch.nn.Module(), t, t, t, None, scaling=1.0)


def test_packed_is_what_suits_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available("packed") == "shared-prefix"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available("packed") == "flex_attention"
    assert available("sdpa") == "sdpa"
    assert [packs(a) for a in ("packed", "shared-prefix", "flex_attention", "sdpa", "eager")] == [True] * 3 + [
        False
    ] * 2
