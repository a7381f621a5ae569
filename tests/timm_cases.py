"""The encoder contract for timm's vision transformers. Run by test_timm.py in a process of its own, where timm is.

torchvision, which timm imports, does not load beside a CPU-only torch: some of its operations are not in the file. None of
them is needed here, so their registrations are passed over before anything imports it.
"""

from __future__ import annotations

import torch


def _passing_over(register):
    """`register`, but for torchvision's operations."""

    def maybe(op, *args, **kwargs):
        if str(op).startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    return maybe


torch.library.register_fake = _passing_over(torch.library.register_fake)
torch.library.register_autograd = _passing_over(torch.library.register_autograd)

import pytest  # noqa: E402
from test_model_tiny import enliven, language_model_folder, pixels, prompt, tiny_tokenizer  # noqa: E402
from transformers import AutoModel, TimmWrapperConfig  # noqa: E402

from commvlm.model import EncoderSpec, build_config, build_model, build_processor  # noqa: E402
from commvlm.model.encoders import check_final_norm, load_encoder, new_encoder, read_layers  # noqa: E402
from commvlm.model.families import family_of, grid, truncate  # noqa: E402

DEPTH, SIDE = 4, 4
SMALL = {"embed_dim": 48, "depth": DEPTH, "num_heads": 4}
# architecture, patch, prefix tokens, first channel's mean
CASES = {
    "eva-clip": ("eva02_large_patch14_clip_336", 14, 1, 0.48145466),
    "deit3": ("deit3_large_patch16_384", 16, 1, 0.485),
    "vit-registers": ("vit_large_patch14_reg4_dinov2", 14, 5, 0.485),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request, tmp_path_factory):
    """Folder, library model, patch, prefix, mean."""
    architecture, patch, prefix, mean = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, model_args={**SMALL, "img_size": SIDE * patch})
    model = enliven(AutoModel.from_config(config)).eval()
    model.save_pretrained(folder)
    return str(folder), model, patch, prefix, mean


def test_a_layer_is_what_its_block_gives_out(case):
    folder, library, patch, prefix, _ = case
    images = torch.randn(2, 3, SIDE * patch, SIDE * patch)
    caught = []
    hooks = [b.register_forward_hook(lambda _m, _i, out: caught.append(out)) for b in library.timm_model.blocks]
    with torch.no_grad():
        library(pixel_values=images)
        timms = library.timm_model.forward_intermediates(images, norm=False, output_fmt="NLC", intermediates_only=True)
    for hook in hooks:
        hook.remove()
    whole = AutoModel.from_pretrained(folder).config
    for layers in ((1,), (2, 4), (1, 2, 3)):
        encoder = load_encoder(folder, truncate(whole, layers[-1]))
        assert len(encoder.timm_model.blocks) == layers[-1]
        for layer, state in zip(layers, read_layers(encoder, images, layers=layers), strict=True):
            assert state.shape == (2, SIDE * SIDE, 48)
            torch.testing.assert_close(state, caught[layer - 1][:, prefix:])
            torch.testing.assert_close(state, timms[layer - 1])


def test_final_norm_after_is_timms_own(case):
    folder, library, patch, prefix, _ = case
    images = torch.randn(1, 3, SIDE * patch, SIDE * patch)
    encoder = load_encoder(folder, truncate(AutoModel.from_pretrained(folder).config, DEPTH))
    (after,) = read_layers(encoder, images, layers=(DEPTH,), final_norm="after")
    with torch.no_grad():
        truth = library.timm_model.forward_features(images)[:, prefix:]
    torch.testing.assert_close(after, truth)


def test_a_norm_behind_the_mean_is_none_of_the_patches(tmp_path):
    architecture = "vit_large_patch14_reg4_dinov2"
    arguments = {**SMALL, "img_size": SIDE * 14}
    for pooled, normed in ((arguments, True), ({**arguments, "global_pool": "avg", "fc_norm": True}, False)):
        config = TimmWrapperConfig(architecture=architecture, model_args=pooled)
        assert family_of(config).normed(config) == normed
    with pytest.raises(ValueError, match="final_norm 'after' is not available for timm_wrapper"):
        check_final_norm(config, "after", name="e", deepest=DEPTH, depth=DEPTH)


def test_a_lit_patch_lights_its_own_token(case):
    folder, _, patch, _, _ = case
    encoder = load_encoder(folder, truncate(AutoModel.from_pretrained(folder).config, 1))
    dark = torch.zeros(1, 3, SIDE * patch, SIDE * patch)
    for row, column in ((0, 1), (2, 3)):
        lit = dark.clone()
        lit[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 3
        change = read_layers(encoder, lit, layers=(1,))[0] - read_layers(encoder, dark, layers=(1,))[0]
        assert change.norm(dim=-1).argmax().item() == row * SIDE + column


def test_another_resolution_interpolates_positions(case):
    folder, _, patch, _, _ = case
    size = 2 * SIDE * patch
    config = truncate(AutoModel.from_pretrained(folder).config, 2, image_size=size)
    encoder = load_encoder(folder, config)
    assert grid(config, size, name="e") == (2 * SIDE, 2 * SIDE)
    (state,) = read_layers(encoder, torch.zeros(1, 3, size, size), layers=(2,))
    assert state.shape[1] == (2 * SIDE) ** 2
    assert (state[0, 0] - state[0, -1]).abs().max() > 1e-3
    assert new_encoder(encoder.config).state_dict().keys() == encoder.state_dict().keys()


def test_in_a_model_with_its_own_statistics_saved_and_loaded(case, tmp_path):
    folder, _, patch, _, mean = case
    language = language_model_folder(tmp_path)
    spec = EncoderSpec("e", folder, "half", image_size=2 * SIDE * patch)
    config = build_config([spec], language_model=language)
    images = build_processor(config, tiny_tokenizer()).image_processor
    assert images.encoders[0]["mean"][0] == pytest.approx(mean)
    model = build_model([spec], language_model=language)
    assert model.config.num_image_tokens == 4 * SIDE * SIDE
    assert family_of(model.config.vision_config.encoder_config("e")).depth(model.config.vision_config.e) == DEPTH
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    ids, row = prompt(model), pixels(model)
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids, pixel_values=row).logits, model(input_ids=ids, pixel_values=row).logits
        )


def test_true_sizes_on_the_meta_device():
    """EVA-02 CLIP L/14 at 336 pixels: about 304 M parameters (arXiv 2303.11331), 576 patches."""
    config = truncate(TimmWrapperConfig(architecture="eva02_large_patch14_clip_336"), 24)
    assert family_of(config).width(config) == 1024
    assert grid(config, 336, name="e") == (24, 24)
    with torch.device("meta"):
        encoder = new_encoder(config)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(304e6, rel=0.01)


def test_an_architecture_that_is_no_plain_transformer_is_refused():
    config = TimmWrapperConfig(architecture="resnet18")
    with pytest.raises(ValueError, match="'resnet18' is no plain vision transformer"):
        family_of(config).depth(config)
