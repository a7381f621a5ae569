"""The visual half as a whole: streamed layers equal held ones, little is held, and what is knocked out has no say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_model_tiny import comm, comm_specs, encoder_folder, enliven, language_model_folder, pixels, prompt

from commvlm.model import EncoderSpec, build_model
from commvlm.model.families import family_of
from commvlm.model.knock_out import parse_knock_out
from commvlm.model.memory import live_bytes

DEPTHS = {"clip": 24, "dinov2": 24}
ASKED = {"clip": tuple(range(1, 25)), "dinov2": (19, 20, 21, 22, 23, 24)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def model(root):
    return comm(root)


@pytest.mark.parametrize(
    ("said", "clip", "dinov2"),
    [
        (None, set(), set()),
        ("dinov2", set(), set(range(6))),
        ("clip:3", {2}, set()),
        ("clip:1-3, dinov2:-1", {0, 1, 2}, {5}),
        (["clip:1", "clip:24", "dinov2:19-20"], {0, 23}, {0, 1}),
        ("dinov2:all", set(), set(range(6))),
    ],
)
def test_what_is_knocked_out_is_read_by_encoder_and_layer(said, clip, dinov2):
    assert parse_knock_out(said, ASKED, DEPTHS) == {"clip": clip, "dinov2": dinov2}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("dino", "there is no encoder 'dino'; did you mean 'dinov2'"),
        ("dinov2:18", "layer 18 is not read; 'dinov2' reads layers 19-24"),
        ("clip:25", "the encoder has 24 layers"),
        ("clip:0", "no layer 0"),
        ("clip,dinov2", "leaves nothing on"),
    ],
)
def test_what_cannot_be_knocked_out_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        parse_knock_out(said, ASKED, DEPTHS)


@pytest.mark.parametrize("merge", ["mean", "lln-layerscale", "conv-layerscale", "layer-attention", "dci"])
def test_streamed_equals_held(root, merge):
    clip, dino = comm_specs(root)
    specs = [EncoderSpec("clip", clip.checkpoint, "all", merge), EncoderSpec("dino", dino.checkpoint, "half", "mean")]
    model = build_model(specs, language_model=language_model_folder(root))
    vision = model.model.vision_tower
    enliven(vision.branches)
    row = pixels(model, 2)
    held = vision.reduce(vision.fuse([vision.branches[n](s) for n, s in vision.read(row).items()]))
    torch.testing.assert_close(vision(row).last_hidden_state, held)
    with torch.no_grad():
        torch.testing.assert_close(vision(row).last_hidden_state, held, rtol=1e-4, atol=1e-5)


def test_gradients_of_streamed_and_held_are_the_same(root):
    model = comm(root).train()
    vision, row = model.model.vision_tower, pixels(model, 2)
    grads = []
    for streamed in (True, False):
        model.zero_grad()
        out = (
            vision(row).last_hidden_state
            if streamed
            else vision.fuse([vision.branches[n](s) for n, s in vision.read(row).items()])
        )
        out.pow(2).mean().backward()
        grads.append([p.grad.clone() for p in vision.branches.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_branch_holds_two_feature_maps_beyond_the_bare_encoders(root):
    """The bare encoders' own peak, and at most two maps a branch, counted from the tensors that are alive."""
    folder = encoder_folder(root, "clip_vision_model")
    specs = [EncoderSpec(name, folder, "all", image_size=256) for name in ("one", "two")]
    model = build_model(specs, language_model=language_model_folder(root))
    vision, row = model.model.vision_tower, pixels(model)
    one = model.config.num_image_tokens * 32 * 4
    with torch.no_grad():
        with live_bytes() as bare:
            for piece, name in zip(vision.split_pixels(row), ("one", "two"), strict=True):
                encoder = vision.encoder(name)
                encoder(pixel_values=piece, **family_of(encoder.config).call)
        with live_bytes() as branch:
            vision(row)
        with live_bytes() as naive:
            kept = [
                encoder(pixel_values=piece, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
                for piece, encoder in zip(vision.split_pixels(row), (vision.enc_one, vision.enc_two), strict=True)
            ]
            [torch.stack(states) for states in kept]
    assert branch.peak - bare.peak <= 4.05 * one
    assert naive.peak - bare.peak > 8 * one


def test_an_encoder_that_is_off_is_not_run_and_has_no_say(model):
    ids, row = prompt(model), pixels(model)
    half = row.shape[1] // 2
    other = torch.cat([row[:, :half], -row[:, half:]], dim=1)
    with torch.no_grad():
        on = [model(input_ids=ids, pixel_values=r).logits for r in (row, other)]
        off = [model(input_ids=ids, pixel_values=r, knock_out="dino").logits for r in (row, other)]
    assert (on[0] - on[1]).abs().max() > 1e-3
    assert torch.equal(*off)
    calls = []
    handle = model.model.vision_tower.encoder("dino").register_forward_hook(lambda *_: calls.append(1))
    model.get_image_features(row, knock_out=["dino"], return_dict=True)
    handle.remove()
    assert not calls


def test_a_layer_that_is_off_is_the_merge_of_the_others_with_larger_weights(model):
    vision, row = model.model.vision_tower, pixels(model)
    states = vision.read(row)
    merge = vision.branches["clip"].merge
    w = merge.logits.softmax(0)
    kept = [0, 2]
    by_hand = sum(w[i] / w[kept].sum() * merge.lln(i, states["clip"][i]) for i in kept)
    fused = torch.cat([by_hand, vision.branches["dino"](states["dino"])], dim=-1)
    got = vision(row, knock_out="clip:2,clip:4").last_hidden_state
    torch.testing.assert_close(got, fused)


def test_generation_takes_the_same_argument(model):
    ids, row = prompt(model), pixels(model) * 3
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    one = model.generate(input_ids=ids, pixel_values=row, knock_out="clip", **options)
    half = row.shape[1] // 2
    same = torch.cat([torch.zeros_like(row[:, :half]), row[:, half:]], dim=1)
    assert torch.equal(one, model.generate(input_ids=ids, pixel_values=same, knock_out=["clip"], **options))
    assert not torch.equal(one, model.generate(input_ids=ids, pixel_values=row, **options))
    with pytest.raises(ValueError, match="did you mean 'clip'"):
        model.generate(input_ids=ids, pixel_values=row, knock_out="clp", **options)


def test_merges_without_weights_list_none(root):
    specs = [EncoderSpec("clip", encoder_folder(root, "clip_vision_model"), "all", "dci")]
    model = build_model(specs, language_model=language_model_folder(root))
    assert model.layer_weights() == {"clip": {}}


def test_a_frozen_batch_norm_goes_by_what_it_has_gathered_and_gathers_no_more(root):
    """One encoder's is frozen, the other's learns: each image alone gives the frozen one's tokens of both together."""
    specs = [EncoderSpec(spec.name, spec.checkpoint, "all", "conv-layerscale") for spec in comm_specs(root)]
    model = build_model(specs, language_model=language_model_folder(root))
    vision = model.model.vision_tower
    frozen, learning = vision.branches.values()
    for branch in (frozen, learning):
        for norm in branch.merge.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    frozen.merge.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in vision.branches.named_buffers()}
    rows = pixels(model, images=2)
    vision.train()(pixel_values=rows)
    for branch, stays in ((frozen, True), (learning, False)):
        assert branch.training
        assert {norm.training for norm in branch.merge.norms} == {not stays}
    changed = {name for name, buffer in vision.branches.named_buffers() if not torch.equal(buffer, before[name])}
    first, second = vision.branches
    assert changed == {name for name in before if name.startswith(f"{second}.")}
    for index, (name, stays) in enumerate([(first, True), (second, False)]):
        setting = vision.config.branches[index]
        shown = vision.split_pixels(rows)[index]
        with torch.no_grad():
            both = vision.branch_tokens(setting, shown, frozenset())
            apart = torch.cat([vision.branch_tokens(setting, row[None], frozenset()) for row in shown])
        assert torch.allclose(both, apart, atol=1e-4) == stays, name
    frozen.merge.requires_grad_(True)
    assert all(norm.training for norm in vision.train().branches[first].merge.norms)


@pytest.mark.parametrize("fuse", ["gated-sum", {"kind": "token-concat"}])
def test_save_and_load_keep_every_setting(root, tmp_path, fuse):
    clip, dino = comm_specs(root)
    specs = [
        EncoderSpec("clip", clip.checkpoint, "all", {"kind": "conv-layerscale", "kernel": 1}),
        EncoderSpec("dino", dino.checkpoint, "half", "layer-attention", {"kind": "linear", "out": 32}),
    ]
    reduce = "pool" if fuse == "gated-sum" else "none"
    model = build_model(specs, language_model=language_model_folder(root), fuse=fuse, reduce=reduce)
    enliven(model.model.vision_tower.branches)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    row = pixels(model)
    with torch.no_grad():
        first, second = (m.eval().get_image_features(row, return_dict=True).pooler_output[0] for m in (model, again))
    torch.testing.assert_close(first, second)
    assert again.config.num_image_tokens == model.config.num_image_tokens
