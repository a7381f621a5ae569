"""Layer numbers and the encoder contract, against forward hooks on the library's own blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model_tiny import DEPTH, ENCODERS, PATCH, SIZE, encoder_folder
from torch import nn
from transformers import AutoModel, CLIPConfig, CLIPModel

from commvlm.model.config import CommVisionConfig
from commvlm.model.encoders import load_encoder, new_encoder, read_layers
from commvlm.model.families import grid, truncate, vision_half
from commvlm.model.layers import describe_layers, parse_layers
from commvlm.model.vision import CommVisionModel

FAMILIES = sorted(ENCODERS)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The library's transformer blocks, found by their number alone."""
    return list(next(m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == DEPTH))


def block_outputs(folder: str, images: torch.Tensor) -> list[torch.Tensor]:
    """What each block of the whole encoder gives out, caught by hooks of our own."""
    encoder = AutoModel.from_pretrained(folder).eval()
    caught: list[torch.Tensor] = []
    for block in blocks_of(encoder):
        block.register_forward_hook(lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        encoder(pixel_values=images)
    return caught


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (12, (12,)),
        (-1, (24,)),
        (-2, (23,)),
        ("7", (7,)),
        ("-24", (1,)),
        ("19-24", (19, 20, 21, 22, 23, 24)),
        ("all", tuple(range(1, 25))),
        ("half", tuple(range(13, 25))),
        ([20, "1-3", -1], (1, 2, 3, 20, 24)),
    ],
)
def test_layers_are_block_numbers_from_one(spec, expected):
    assert parse_layers(spec, 24) == expected


@pytest.mark.parametrize(
    "spec",
    [
        0,
        "0",
        25,
        -25,
        "25",
        "19-",
        "-",
        "",
        "19-25",
        "0-3",
        "5-3",
        "x",
        [],
        [3, 3],
        ["1-4", 2],
        [24, -1],
        1.5,
        True,
        None,
    ],
)
def test_wrong_layers_are_refused_with_the_depth(spec):
    with pytest.raises(ValueError, match="the encoder has 24 layers; valid: 1 to 24") as error:
        parse_layers(spec, 24)
    assert "\n" not in str(error.value)


@given(st.sets(st.integers(1, 24), min_size=1))
def test_layers_described_read_back(layers):
    described = describe_layers(sorted(layers))
    assert parse_layers(described.split(", "), 24) == tuple(sorted(layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_k_is_what_block_k_gives_out(root, family):
    images = torch.randn(2, 3, SIZE, SIZE)
    folder = encoder_folder(root, family)
    truth = block_outputs(folder, images)
    patches = (SIZE // PATCH) ** 2
    whole = AutoModel.from_pretrained(folder).config
    for layers in [(1,), (2,), (DEPTH,), (1, 3), tuple(range(1, DEPTH + 1))]:
        encoder = load_encoder(folder, truncate(whole, layers[-1]))
        states = read_layers(encoder, images, layers=layers)
        assert len(states) == len(layers)
        for layer, state in zip(layers, states, strict=True):
            assert state.shape == (2, patches, whole.hidden_size)
            torch.testing.assert_close(state, truth[layer - 1][:, -patches:], rtol=1e-5, atol=1e-5)
        for other in range(DEPTH):  # no two blocks give the same, so no other index could have passed
            assert other == layers[-1] - 1 or (states[-1] - truth[other][:, -patches:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_only_blocks_up_to_the_deepest_layer_exist(family):
    encoder = new_encoder(truncate(ENCODERS[family], 2))
    whole = AutoModel.from_config(ENCODERS[family])
    block = sum(p.numel() for p in blocks_of(whole)[0].parameters())
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
    assert [len(m) for m in lists] == [2]
    assert sum(p.numel() for p in encoder.parameters()) <= sum(p.numel() for p in whole.parameters()) - 2 * block


@pytest.mark.parametrize("family", FAMILIES)
def test_another_resolution_interpolates_positions(root, family):
    folder = encoder_folder(root, family)
    config = truncate(AutoModel.from_pretrained(folder).config, 2)
    encoder = load_encoder(folder, config)
    larger = torch.randn(1, 3, 2 * SIZE, 2 * SIZE)
    (state,) = read_layers(encoder, larger, layers=(2,))
    rows, columns = grid(config, 2 * SIZE, name="e")
    assert (rows, columns) == (8, 8)
    assert state.shape == (1, rows * columns, config.hidden_size)
    flat = torch.zeros(1, 3, 2 * SIZE, 2 * SIZE)  # equal patches: only interpolated positions can tell them apart
    (same,) = read_layers(encoder, flat, layers=(2,))
    assert (same[0, 0] - same[0, -1]).abs().max() > 1e-3


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(
        ValueError, match="image_size 30 is not a multiple of its patch size 8; set image_size to 24 or 32"
    ):
        grid(ENCODERS["vit"], 30, name="vit")


def test_the_vision_half_of_a_whole_clip_loads_completely(tmp_path):
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    whole = CLIPModel(
        CLIPConfig(text_config=text, vision_config=ENCODERS["clip_vision_model"].to_dict(), projection_dim=16)
    )
    whole.save_pretrained(tmp_path)
    half = vision_half(whole.config)
    encoder = load_encoder(str(tmp_path), truncate(half, 3))
    images = torch.randn(1, 3, SIZE, SIZE)
    truth = whole.eval().vision_model(pixel_values=images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read_layers(encoder, images, layers=(3,))[0], truth[3][:, 1:])


def test_final_norm_after_is_the_encoders_own_norm_of_the_last_block(root):
    folder, images = encoder_folder(root, "dinov2"), torch.randn(1, 3, SIZE, SIZE)
    encoder = load_encoder(folder, truncate(AutoModel.from_pretrained(folder).config, DEPTH))
    truth = block_outputs(folder, images)
    third, last = read_layers(encoder, images, layers=(3, DEPTH), final_norm="after")
    torch.testing.assert_close(third, truth[2][:, 1:])
    norm = encoder.layernorm
    expected = nn.functional.layer_norm(truth[3], norm.normalized_shape, norm.weight, norm.bias, norm.eps)[:, 1:]
    torch.testing.assert_close(last, expected)
    assert (last - truth[3][:, 1:]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("clip_vision_model", [4], "not available for clip_vision_model"),
        ("dinov2", [3], "needs the last layer, 4, but the deepest asked one is 3"),
    ],
)
def test_final_norm_after_is_refused_where_there_is_none(family, layers, message):
    config = truncate(ENCODERS[family], layers[-1])
    branch = {"name": "e", "depth": DEPTH, "layers": layers, "image_size": SIZE, "final_norm": "after"}
    with pytest.raises(ValueError, match=message):
        CommVisionConfig(branches=[branch], e=config)


def test_a_checkpoint_that_ties_its_last_hidden_state_is_read_before_the_norm(root, tmp_path):
    folder, images = encoder_folder(root, "dinov2"), torch.randn(1, 3, SIZE, SIZE)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_last_hidden_states": True}))
    encoder = load_encoder(str(tmp_path), truncate(AutoModel.from_pretrained(tmp_path).config, DEPTH))
    (state,) = read_layers(encoder, images, layers=(DEPTH,))
    torch.testing.assert_close(state, block_outputs(folder, images)[-1][:, 1:])


def test_encoders_stay_frozen_and_in_eval_mode_whatever_the_model_does():
    config = truncate(ENCODERS["dinov2"], 2)  # has dropout, which would show
    vision = CommVisionModel(
        CommVisionConfig(branches=[{"name": "dino", "layers": [2], "image_size": SIZE}], dino=config)
    )
    row = torch.randn(2, vision.config.pixels_per_image)
    quiet = vision.eval().read(row)["dino"][0]
    vision.requires_grad_(True).train()
    assert vision.training
    assert vision.branches.training
    assert not any(m.training for m in vision.encoder("dino").modules())
    assert not any(p.requires_grad for p in vision.encoder("dino").parameters())
    loud = vision.read(row)["dino"][0]
    assert torch.equal(quiet, loud)
    assert not loud.requires_grad
