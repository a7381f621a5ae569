"""Layer numbers and the encoder contract, against forward hooks on the library's own blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model_tiny import DEPTH, ENCODERS, PATCH, SIZE, encoder_folder, language_model_folder, tiny_tokenizer
from torch import nn
from transformers import AutoModel, CLIPConfig, CLIPModel, MetaClip2Config, MetaClip2Model, Siglip2Config, Siglip2Model

from commvlm.model import EncoderSpec, build_config, build_processor
from commvlm.model.config import CommVisionConfig
from commvlm.model.encoders import load_encoder, new_encoder, read_layers, stream_layers
from commvlm.model.families import grid, truncate, vision_half
from commvlm.model.layers import describe_layers, parse_layers
from commvlm.model.vision import CommVisionModel

FAMILIES = sorted(ENCODERS)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("encoders")


def blocks_of(encoder: nn.Module, depth: int = DEPTH) -> list[nn.Module]:
    """The library's transformer blocks, found by their number alone."""
    return list(next(m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth))


def block_outputs(folder: str, images: torch.Tensor) -> list[torch.Tensor]:
    """What each block of the whole encoder gives out, caught by hooks of our own."""
    encoder = AutoModel.from_pretrained(folder).eval()
    kind = encoder.config.model_type
    inputs = {"pixel_values": images}
    if kind == "siglip2_vision_model":
        inputs = patches_one_by_one(images)
    elif kind == "vit_mae":  # it shuffles its patches by the order of this noise
        inputs["noise"] = torch.arange((SIZE // PATCH) ** 2).float().expand(len(images), -1)
    caught: list[torch.Tensor] = []
    for block in blocks_of(encoder):
        block.register_forward_hook(lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        encoder(**inputs)
    return caught


def patches_one_by_one(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """SigLIP2's input, written out: one row per patch, its pixels row by row, the three colours of a pixel together."""
    rows = []
    for image in images:
        side = range(0, SIZE, PATCH)
        pieces = [image[:, y : y + PATCH, x : x + PATCH] for y in side for x in side]
        rows.append(
            torch.stack([torch.stack([p[:, v, u] for v in range(PATCH) for u in range(PATCH)]) for p in pieces])
        )
    pixels = torch.stack(rows).flatten(2)
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[SIZE // PATCH, SIZE // PATCH]] * len(images)),
    }


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
    whole = vision_half(AutoModel.from_pretrained(folder).config)
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
    encoder = new_encoder(truncate(vision_half(ENCODERS[family]), 2))
    whole = AutoModel.from_config(ENCODERS[family])
    block = sum(p.numel() for p in blocks_of(whole)[0].parameters())
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
    assert [len(m) for m in lists] == [2]
    assert sum(p.numel() for p in encoder.parameters()) <= sum(p.numel() for p in whole.parameters()) - 2 * block


def whole_config(folder: str):
    return vision_half(AutoModel.from_pretrained(folder).config)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_resolution_interpolates_positions(root, family):
    folder = encoder_folder(root, family)
    config = truncate(whole_config(folder), 2, image_size=2 * SIZE)
    encoder = load_encoder(folder, config)
    larger = torch.randn(1, 3, 2 * SIZE, 2 * SIZE)
    (state,) = read_layers(encoder, larger, layers=(2,))
    rows, columns = grid(config, 2 * SIZE, name="e")
    assert (rows, columns) == (8, 8)
    assert state.shape == (1, rows * columns, config.hidden_size)
    flat = torch.zeros(1, 3, 2 * SIZE, 2 * SIZE)  # equal patches: only interpolated positions can tell them apart
    (same,) = read_layers(encoder, flat, layers=(2,))
    spread = (same[0, 0] - same[0, -1]).abs().max()
    # Rotary positions alone (DINOv3) move attention, and equal patches have equal values to attend to.
    assert spread > 1e-3 or family == "dinov3_vit"


def test_a_table_of_positions_is_resized_the_right_way_round(root):
    """AIMv2: a ramp over the rows stays one."""
    folder = encoder_folder(root, "aimv2_vision_model")
    whole = AutoModel.from_pretrained(folder)
    table = next(p for name, p in whole.named_parameters() if name.endswith("position_embedding.weight"))
    side = round(len(table) ** 0.5)
    with torch.no_grad():
        table.copy_(torch.arange(side).repeat_interleave(side)[:, None].expand_as(table))
    whole.save_pretrained(root / "ramp")
    encoder: Any = load_encoder(str(root / "ramp"), truncate(whole_config(folder), 2, image_size=2 * SIZE))
    found = encoder.embeddings.position_embedding.weight[:, 0].view(2 * side, 2 * side)
    assert (found.diff(dim=0) > 0).all()
    torch.testing.assert_close(found, found[:, :1].expand_as(found))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lit_patch_lights_its_own_token_in_row_major_order(root, family):
    folder = encoder_folder(root, family)
    encoder = load_encoder(folder, truncate(whole_config(folder), 1))
    dark = torch.zeros(1, 3, SIZE, SIZE)
    for row, column in ((0, 0), (0, 3), (1, 2), (3, 1)):
        lit = dark.clone()
        lit[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 3
        change = read_layers(encoder, lit, layers=(1,))[0] - read_layers(encoder, dark, layers=(1,))[0]
        assert change.norm(dim=-1).argmax().item() == row * (SIZE // PATCH) + column


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_the_image_changes_every_layer(root, family):
    folder = encoder_folder(root, family)
    encoder = load_encoder(folder, truncate(whole_config(folder), DEPTH))
    first, second = (read_layers(encoder, torch.randn(1, 3, SIZE, SIZE), layers=(1, 2, 3, 4)) for _ in range(2))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_final_norm_after_is_the_whole_encoders_last_hidden_state_or_refused(root, family):
    folder = encoder_folder(root, family)
    whole = whole_config(folder)
    if family in ("clip_vision_model", "metaclip_2_vision_model", "radio"):
        branch = {"name": "e", "layers": [DEPTH], "image_size": SIZE, "final_norm": "after"}
        with pytest.raises(ValueError, match=r"final_norm 'after' is not available"):
            CommVisionConfig(branches=[branch], e=truncate(whole, DEPTH))
        return
    images = torch.randn(1, 3, SIZE, SIZE)
    encoder = load_encoder(folder, truncate(whole, DEPTH))
    (after,) = read_layers(encoder, images, layers=(DEPTH,), final_norm="after")
    library = AutoModel.from_pretrained(folder).eval()
    inputs = {"pixel_values": images}
    if family == "siglip2_vision_model":
        inputs = patches_one_by_one(images)
    if family == "vit_mae":
        inputs["noise"] = torch.arange(16).float()[None]
    with torch.no_grad():
        truth = library(**inputs).last_hidden_state[:, -after.shape[1] :]
    torch.testing.assert_close(after, truth, rtol=1e-5, atol=1e-5)
    assert (after - read_layers(encoder, images, layers=(DEPTH,))[0]).abs().max() > 0.05


PUBLISHED = {  # mean and std of the first channel, by the models' own papers and preprocessors
    "clip_vision_model": (0.48145466, 0.26862954), "metaclip_2_vision_model": (0.48145466, 0.26862954),
    "aimv2_vision_model": (0.48145466, 0.26862954), "siglip_vision_model": (0.5, 0.5),
    "siglip2_vision_model": (0.5, 0.5), "vit": (0.5, 0.5), "dinov2": (0.485, 0.229),
    "dinov2_with_registers": (0.485, 0.229), "dinov3_vit": (0.485, 0.229), "deit": (0.485, 0.229),
    "vit_mae": (0.485, 0.229), "radio": (0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_normalised_by_its_own_statistics(root, family):
    config = build_config([EncoderSpec("e", encoder_folder(root, family))], language_model=language_model_folder(root))
    images = build_processor(config, tiny_tokenizer()).image_processor
    red = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    mean, std = PUBLISHED[family]
    assert images.row(red)[0] == pytest.approx((1 - mean) / std, rel=1e-5)


def test_layers_are_handed_over_as_their_blocks_finish_and_no_graph_leads_into_the_encoder(root):
    """While layer 2 is merged, block 3 has not run."""
    encoder = load_encoder(encoder_folder(root, "dinov2"), truncate(ENCODERS["dinov2"], 3))
    order: list[str] = []
    for number, block in enumerate(blocks_of(encoder, 3), start=1):
        block.register_forward_pre_hook(lambda _m, _i, n=number: order.append(f"block {n}"))
    grads: list[bool] = []

    def take(place: int, state: torch.Tensor) -> None:
        order.append(f"layer {place}")
        grads.append(torch.is_grad_enabled() and not state.requires_grad)

    stream_layers(encoder, torch.randn(1, 3, SIZE, SIZE), layers=(1, 3), take=take)
    assert order == ["block 1", "layer 0", "block 2", "block 3", "layer 1"]
    assert grads == [True, True]
    assert not any(block._forward_hooks for block in blocks_of(encoder, 3))


def test_a_two_sided_metaclip_and_siglip2_give_their_vision_half(tmp_path):
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
    }  # fmt: skip
    for kind, config, family in (
        (MetaClip2Model, MetaClip2Config, "metaclip_2_vision_model"),
        (Siglip2Model, Siglip2Config, "siglip2_vision_model"),
    ):
        whole = kind(config(text_config=text, vision_config=ENCODERS[family].to_dict())).eval()
        whole.save_pretrained(tmp_path / family)
        encoder = load_encoder(str(tmp_path / family), truncate(vision_half(whole.config), 3))
        images = torch.randn(1, 3, SIZE, SIZE)
        caught = []
        blocks_of(whole.vision_model, DEPTH)[2].register_forward_hook(lambda _m, _i, out, c=caught: c.append(out))
        with torch.no_grad():
            whole.vision_model(**(patches_one_by_one(images) if "siglip" in family else {"pixel_values": images}))
        out = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
        torch.testing.assert_close(read_layers(encoder, images, layers=(3,))[0], out[:, -16:])


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
