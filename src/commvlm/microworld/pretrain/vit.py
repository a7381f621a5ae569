"""The tiny vision transformers: the library's own CLIP and DINOv2 classes at one size, as plain checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from ..scene import SIDE

PATCH = 8
GRID = SIDE // PATCH
SIZE = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
MEAN_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""The published pixel statistics of both families; the tiny ones keep them, as their real models do."""


def new_clip(vocabulary: int, eos: int, pad: int) -> CLIPModel:
    """A CLIP of two small towers: the vision half has 1.6 M parameters, the text half two layers."""
    vision = {
        **SIZE,
        "intermediate_size": 512,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "projection_dim": 128,
    }
    text = {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512,
        "hidden_act": "gelu", "projection_dim": 128, "vocab_size": vocabulary, "max_position_embeddings": 40,
        "eos_token_id": eos, "pad_token_id": pad, "bos_token_id": 1,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, attn_implementation="eager")  # pyright: ignore[reportCallIssue]
    return CLIPModel(config)


def new_dinov2() -> Dinov2Model:
    """A DINOv2 backbone of the same size."""
    config = Dinov2Config(
        **SIZE, mlp_ratio=4, image_size=SIDE, patch_size=PATCH, hidden_act="gelu", layerscale_value=1.0,
        use_mask_token=True, attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return Dinov2Model(config)


def normalised(pixels: Tensor, family: str) -> Tensor:
    """uint8 (b, h, w, 3) -> float (b, 3, h, w) with the family's mean and std."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD[family])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


@contextmanager
def keep_patches(embeddings: nn.Module, kept: Tensor) -> Iterator[None]:
    """Inside, `embeddings` gives out its first token and only the kept patches (b, m), each with its true position."""

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        patches = output[:, 1:].gather(1, kept[..., None].expand(-1, -1, output.shape[-1]))
        return torch.cat([output[:, :1], patches], dim=1)

    hook = embeddings.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()
