"""Tiny random checkpoints that the model's tests build from, and a test that they are what they say."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    MetaClip2VisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RadioConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTMAEConfig,
)

from commvlm.model import CommForConditionalGeneration, EncoderSpec, build_model

DEPTH = 4
PATCH = 8
SIZE = 32
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}

ENCODERS = {
    "clip_vision_model": CLIPVisionConfig(**_SIZES, intermediate_size=64),
    "dinov2": Dinov2Config(**{**_SIZES, "hidden_size": 24}, hidden_dropout_prob=0.3),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**_SIZES, num_register_tokens=3),
    "siglip_vision_model": SiglipVisionConfig(**_SIZES, intermediate_size=64),
    "vit": ViTConfig(**_SIZES, intermediate_size=64),
    "deit": DeiTConfig(**_SIZES, intermediate_size=64),
    "metaclip_2_vision_model": MetaClip2VisionConfig(**_SIZES, intermediate_size=64),
    "siglip2_vision_model": Siglip2VisionConfig(
        **{k: v for k, v in _SIZES.items() if k != "image_size"}, intermediate_size=64, num_patches=(SIZE // PATCH) ** 2
    ),
    "dinov3_vit": DINOv3ViTConfig(**_SIZES, intermediate_size=64, num_register_tokens=2),
    "vit_mae": ViTMAEConfig(**_SIZES, intermediate_size=64, mask_ratio=0.0),
    "aimv2_vision_model": Aimv2VisionConfig(**_SIZES, intermediate_size=64),
    "radio": RadioConfig(**_SIZES, mlp_ratio=2.0, max_img_size=2 * SIZE),
}
_TEXT = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LANGUAGE_MODELS = {
    "llama": LlamaConfig(**_TEXT, **_IDS, max_position_embeddings=256),
    "qwen3": Qwen3Config(
        **_TEXT, **_IDS, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, max_position_embeddings=256
    ),
}


def enliven(model: torch.nn.Module) -> torch.nn.Module:
    """Random values far from the library's quiet 0.02, so that a wrong layer or norm is plain to see."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def encoder_folder(root: Path, family: str) -> str:
    """A saved encoder of the family, made on first use."""
    folder = root / family
    if not folder.exists():
        torch.manual_seed(1)
        enliven(AutoModel.from_config(ENCODERS[family])).save_pretrained(folder)
    return str(folder)


def language_model_folder(root: Path, family: str = "llama") -> str:
    """A saved causal language model of the family, made on first use."""
    folder = root / family
    if not folder.exists():
        torch.manual_seed(2)
        enliven(AutoModelForCausalLM.from_config(LANGUAGE_MODELS[family])).save_pretrained(folder)
    return str(folder)


def comm_specs(root: Path) -> list[EncoderSpec]:
    """CLIP, all layers, and DINOv2, its second half with an MLP: the paper's branches, small."""
    return [
        EncoderSpec("clip", encoder_folder(root, "clip_vision_model"), "all"),
        EncoderSpec("dino", encoder_folder(root, "dinov2"), "half", align="mlp"),
    ]


def comm(root: Path, *, language_model: str = "llama", **settings) -> CommForConditionalGeneration:
    """A small COMM, its trained parts enlivened too."""
    model = build_model(comm_specs(root), language_model=language_model_folder(root, language_model), **settings)
    enliven(model.model.vision_tower.branches)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of a small vocabulary."""
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<image>",
        "what",
        "is",
        "this",
        "?",
        "a",
        "red",
        "cat",
        "USER",
        "ASSISTANT",
        ":",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def prompt(model: CommForConditionalGeneration, *, before: int = 2, after: int = 3, seed: int = 0) -> torch.Tensor:
    """(1, n) ids: some text, one image's placeholders, some text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 60, (before + after,), generator=generator).tolist()
    image = [model.config.image_token_id] * model.config.num_image_tokens
    return torch.tensor([text[:before] + image + text[before:]])


def pixels(model: CommForConditionalGeneration, images: int = 1, *, seed: int = 0) -> torch.Tensor:
    """(images, P) of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, model.config.vision_config.pixels_per_image, generator=generator)


def test_tiny_parts_are_what_they_say(tmp_path):
    model = comm(tmp_path)
    assert model.config.num_image_tokens == (SIZE // PATCH) ** 2
    assert [type(part).__name__ for part in model.parts()["encoders"]] == ["CLIPVisionModel", "Dinov2Model"]
    assert tiny_tokenizer()("what is <image> ?")["input_ids"] == [5, 6, 4, 8]
