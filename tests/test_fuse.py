"""Fuses, reductions and resampling against arithmetic by hand, and how many tokens a config promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_model_tiny import comm_specs, encoder_folder, language_model_folder, pixels

from commvlm.model import EncoderSpec, build_config, build_model
from commvlm.model.fuse import FUSES, REDUCES, GatedSum, Interleave, PixelShuffle, Pool, Sum, TokenConcat
from commvlm.model.tokens import Tokens, resample

GRID, DIM = (2, 4), 6
COUNT = GRID[0] * GRID[1]
PAIR = [Tokens.of(GRID, DIM), Tokens.of(GRID, DIM)]


def pair() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, COUNT, DIM, generator=generator) for _ in range(2)]


def test_token_concat_puts_one_after_the_other_and_takes_different_grids():
    first, second = pair()[0], torch.randn(2, 9, DIM)
    fuse = TokenConcat([PAIR[0], Tokens.of((3, 3), DIM)])
    fused = fuse([first, second])
    assert (fuse.out.count, fuse.out.grid) == (COUNT + 9, None)
    assert torch.equal(fused[:, :COUNT], first)
    assert torch.equal(fused[:, COUNT:], second)


def test_interleave_takes_turns_in_the_images_order():
    first, second = pair()
    fuse = Interleave(PAIR)
    fused = fuse([first, second])
    assert fuse.out.count == 2 * COUNT
    assert torch.equal(fused[:, 0::2], first)
    assert torch.equal(fused[:, 1::2], second)


def test_sum_adds_and_gated_sum_gates():
    first, second = pair()
    assert torch.equal(Sum(PAIR)([first, second]), first + second)
    for gate, gates in (("channel", DIM), ("token", 1)):
        fuse = GatedSum(PAIR, gate=gate)
        weight, bias = (p.detach().numpy() for p in fuse.gate.parameters())
        both = np.concatenate([first.numpy(), second.numpy()], axis=-1)
        scores = both @ weight.T + bias
        a, b = scores[..., :gates], scores[..., gates:]
        share = 1 / (1 + np.exp(b - a))  # two branches: the sigmoid of the gated multimodal unit
        expected = share * first.numpy() + (1 - share) * second.numpy()
        np.testing.assert_allclose(fuse([first, second]).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(FUSES))
def test_a_branch_that_is_off_contributes_nothing(kind):
    first, second = pair()
    fuse = FUSES[kind](PAIR)
    fused = fuse([first, None])
    assert fused.shape == fuse([first, second]).shape == (2, fuse.out.count, fuse.out.dim)
    if kind == "channel-concat":
        assert torch.equal(fused[..., :DIM], first)
        assert not fused[..., DIM:].any()
    elif kind in ("sum", "gated-sum"):  # a gate of one: the other's share is its own now
        torch.testing.assert_close(fused, first)
    else:
        kept = fused[:, :COUNT] if kind == "token-concat" else fused[:, 0::2]
        left = fused[:, COUNT:] if kind == "token-concat" else fused[:, 1::2]
        assert torch.equal(kept, first)
        assert not left.any()


def test_pixel_shuffle_and_pool_take_square_neighbours():
    tokens = pair()[0]
    square = tokens.numpy().reshape(2, *GRID, DIM)
    blocks = [
        np.concatenate([square[:, 0, c], square[:, 0, c + 1], square[:, 1, c], square[:, 1, c + 1]], -1) for c in (0, 2)
    ]
    shuffle, pool = PixelShuffle(PAIR[0]), Pool(PAIR[0])
    assert np.array_equal(shuffle(tokens).numpy(), np.stack(blocks, axis=1))
    assert shuffle.out == Tokens(2, 4 * DIM, (1, 2))
    expected = np.stack([square[:, :, c : c + 2].mean(axis=(1, 2)) for c in (0, 2)], axis=1)
    np.testing.assert_allclose(pool(tokens).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert pool.out == Tokens(2, DIM, (1, 2))
    with pytest.raises(ValueError, match="2 x 4 cannot be reduced by a factor of 4"):
        Pool(PAIR[0], factor=4)
    with pytest.raises(ValueError, match="8 tokens cannot be reduced"):
        REDUCES["pool"](Tokens(8, DIM))


def test_resampling_keeps_a_plane_a_plane_and_the_mean():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    tokens = torch.stack([rows, columns, rows + 2 * columns], dim=-1).reshape(1, 64, 3)
    small = resample(tokens, (8, 8), (4, 4)).view(4, 4, 3)
    centres = torch.tensor([0.5, 2.5, 4.5, 6.5])  # in the large grid's units
    inner = slice(1, 3)  # at the rim antialiasing has fewer neighbours
    torch.testing.assert_close(small[inner, inner, 0], centres[inner, None].expand(2, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(small[inner, inner, 1], centres[None, inner].expand(2, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(resample(tokens, (8, 8), (16, 16)).mean(1), tokens.mean(1), atol=1e-3, rtol=0)
    assert resample(tokens, (8, 8), (8, 8)) is tokens


@pytest.mark.parametrize(
    ("fuse", "message"),
    [
        ("sum", "fuse 'sum': the widths of the branches differ.*give the align of one of them out: 32"),
        ({"kind": "gated-sum", "gate": "chanel"}, "gate='chanel'"),
        ({"kind": "channel-concat", "grid": "clp"}, "grid 'clp', which is no encoder; did you mean 'clip'"),
        ({"kind": "channel-concat", "grid": [0, 3]}, "give an encoder's name, a side such as 24"),
        ("token-cat", "did you mean 'token-concat'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(tmp_path, fuse, message):
    with pytest.raises(ValueError, match=message) as error:
        build_config(comm_specs(tmp_path), language_model=language_model_folder(tmp_path), fuse=fuse)
    assert "\n" not in str(error.value)


def test_grids_differ_never_silently(tmp_path):
    specs, name = comm_specs(tmp_path), language_model_folder(tmp_path)
    wide = [specs[0], EncoderSpec("dino", specs[1].checkpoint, "half", image_size=64)]
    with pytest.raises(
        ValueError, match=r"set image_size of 'dino' to 32, or name the grid .*grid: clip.*token-concat"
    ):
        build_config(wide, language_model=name)
    for fuse, tokens in (
        ({"kind": "channel-concat", "grid": "clip"}, 16), ({"kind": "channel-concat", "grid": "dino"}, 64),
        ({"kind": "channel-concat", "grid": [2, 3]}, 6), ({"kind": "interleave", "grid": 4}, 32),
    ):  # fmt: skip
        align = {"kind": "linear", "out": 32} if fuse["kind"] == "interleave" else "identity"
        given = [wide[0], EncoderSpec("dino", specs[1].checkpoint, "half", image_size=64, align=align)]
        model = build_model(given, language_model=name, fuse=fuse)
        assert model.config.num_image_tokens == tokens
        out = model.get_image_features(pixels(model, 2), return_dict=True).pooler_output
        assert [tuple(t.shape) for t in out] == [(tokens, 48)] * 2


@pytest.mark.parametrize("align", ["language-model", 40])
def test_an_align_may_be_as_wide_as_the_language_model(tmp_path, align):
    specs = [
        EncoderSpec(
            "clip", encoder_folder(tmp_path, "clip_vision_model"), -2, "mean", {"kind": "linear", "out": align}
        ),
        EncoderSpec("dino", encoder_folder(tmp_path, "dinov2"), -1, "mean", {"kind": "mlp", "out": align}),
    ]
    name = language_model_folder(tmp_path)
    if align == 40:
        with pytest.raises(ValueError, match="'identity' gives tokens of width 40, the language model needs 48"):
            build_config(specs, language_model=name, fuse="interleave", project="identity")
        return
    model = build_model(specs, language_model=name, fuse="interleave", project="identity")
    assert model.config.num_image_tokens == 32
    features = model.get_image_features(pixels(model), return_dict=True)
    assert torch.equal(features.last_hidden_state[0], features.pooler_output[0])


@pytest.mark.parametrize("reduce", ["pixel-shuffle", {"kind": "pool", "factor": 4}])
def test_reduced_tokens_are_known_before_running_and_come_out_so(tmp_path, reduce):
    model = build_model(comm_specs(tmp_path), language_model=language_model_folder(tmp_path), reduce=reduce)
    promised = model.config.num_image_tokens
    assert promised == (4 if reduce == "pixel-shuffle" else 1)
    assert model.config.vision_config.hidden_size == (4 * 56 if reduce == "pixel-shuffle" else 56)
    assert model.get_image_features(pixels(model), return_dict=True).pooler_output[0].shape == (promised, 48)
