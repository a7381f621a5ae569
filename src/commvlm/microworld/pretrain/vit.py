"""The tiny vision transformers: the library's own CLIP, DINOv2, MAE and ViT classes at one size, as plain checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from ..scene import SIDE

PATCH = 8
GRID = SIDE // PATCH
SIZE = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
MEAN_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mae": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "deit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""The published pixel statistics of the families; the tiny ones keep them, as their real models do."""


def new_clip(vocabulary: int, pad: int) -> CLIPModel:
    """A CLIP of two small towers: the vision half has 1.6 M parameters, the text half two layers.

    A caption ends with the id `vocabulary`, one beyond the tokenizer's. The tokenizer's own end is 2, and there the library
    takes the caption from its token of the highest id (as the published configs of CLIP, which say 2, want it, whose end has
    the highest), in the tiny vocabulary some word in the middle; the tower is causal, so what follows would not be read.
    """
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
        "hidden_act": "gelu", "projection_dim": 128, "vocab_size": vocabulary + 1, "max_position_embeddings": 40,
        "eos_token_id": vocabulary, "pad_token_id": pad, "bos_token_id": 1,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, attn_implementation="eager")  # pyright: ignore[reportCallIssue]
    return CLIPModel(config)


def new_dinov2() -> Dinov2Model:
    """A DINOv2 backbone of the same size, which starts with sine-cosine positions and looking around."""
    config = Dinov2Config(
        **SIZE, mlp_ratio=4, image_size=SIDE, patch_size=PATCH, hidden_act="gelu", layerscale_value=1.0,
        use_mask_token=True, attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    model = Dinov2Model(config)
    with torch.no_grad():
        model.embeddings.position_embeddings.copy_(positions(128))
        reserved = look_around(model, 128)
        model.embeddings.cls_token[..., reserved] = 0  # the class token starts looking everywhere alike
    return model


def positions(width: int) -> Tensor:
    """(1, 1 + 64, width): nothing for the class token, the sine-cosine position of every patch."""
    return build_2d_sinusoidal_position_embedding(GRID, GRID, width, cls_token=True)[None]


def new_mae() -> ViTMAEForPreTraining:
    """An MAE: the encoder of the same size, and a decoder of two layers of half its width that is thrown away."""
    config = ViTMAEConfig(
        **SIZE, intermediate_size=512, image_size=SIDE, patch_size=PATCH, hidden_act="gelu", mask_ratio=0.75,
        decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=256, attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    _set_tables(model)
    look_around(model.vit, 128)
    look_around(model.decoder, 64)
    return model


@torch.no_grad()
def _set_tables(model: ViTMAEForPreTraining) -> None:
    """The fixed positions of encoder and decoder, and their learned tokens. The library (5.23) leaves all of them at zero
    in a model that is not loaded but made; without positions every hidden patch is answered alike."""
    embeddings, decoder = model.vit.embeddings, model.decoder
    for table in (embeddings.position_embeddings, decoder.decoder_pos_embed):
        table.copy_(positions(table.shape[-1]))
    for token in (embeddings.cls_token, decoder.mask_token):
        nn.init.normal_(token, std=0.02)


def new_vit(classes: int) -> ViTForImageClassification:
    """A plain ViT of the same size with a linear classifier on its class token, as DeiT III's (it has no other token)."""
    config = ViTConfig(
        **SIZE, intermediate_size=512, image_size=SIDE, patch_size=PATCH, hidden_act="gelu",
        num_labels=classes,  # pyright: ignore[reportCallIssue]
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return ViTForImageClassification(config)


NEIGHBOURS = (((0, -1), (0, 1), (-1, 0), (1, 0)), ((-1, -1), (-1, 1), (1, -1), (1, 1)))
"""Rows and columns from a patch to what each of its four heads looks at, in even and in odd layers."""


@torch.no_grad()
def look_around(model: nn.Module, width: int, *, sharpness: float = 3.0) -> Tensor:
    """Starts each head of `model`'s attention layers looking at one neighbour of its patch, and passing it on.

    As ConViT (d'Ascoli et al., arXiv 2103.10697), here by weights alone: a head's queries are the sine-cosine positions of
    one patch further, its keys the positions themselves, in the `head_dim` channels of highest frequency, to which nothing
    else writes at the start; returns these. Values and outputs are each other's transpose (Trockman and Kolter, arXiv
    2305.09828).
    """
    quarter = width // 4
    used = width // 4 // 4  # frequencies; sines and cosines of rows and columns make a head's width of them
    reserved = torch.cat([torch.arange(used) + part * quarter for part in range(4)])
    layers = [m for m in model.modules() if {"q_proj", "k_proj", "v_proj", "o_proj"} <= dict(m.named_children()).keys()]
    for number, layer in enumerate(layers):
        q, k, v, o = (layer.get_parameter(f"{name}_proj.weight") for name in "qkvo")
        for weight in (q, k):
            weight.zero_()
        for head, offsets in enumerate(NEIGHBOURS[number % 2]):
            row = head * width // 4
            for axis, offset in enumerate(offsets):
                for i in range(used):
                    angle = torch.tensor(offset * 10000.0 ** (-i / quarter))
                    sine, cosine = 2 * axis * quarter + i, (2 * axis + 1) * quarter + i
                    k[row, sine] = k[row + 1, cosine] = sharpness
                    q[row, sine] = q[row + 1, cosine] = sharpness * angle.cos()
                    q[row, cosine], q[row + 1, sine] = sharpness * angle.sin(), -sharpness * angle.sin()
                    row += 2
        nn.init.orthogonal_(v, gain=0.6)
        o.copy_(v.T)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "fc2.weight", "patch_embeddings.projection.weight", "decoder_embed.weight")):
            weight[reserved] = 0
    return reserved


STARTS: dict[str, Callable[[], nn.Module]] = {"mae": lambda: new_mae().vit, "dinov2": new_dinov2}
"""The encoders that do not start as the library would: a card holds them against both starts."""


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
