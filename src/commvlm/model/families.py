"""What differs between the library's encoders: one table row per family, and what a row says of a config.

The only file that knows names inside a library's encoder. A new family is one row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, ViTConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from . import timm_encoders as timm
from .names import lookup

Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)

FINAL_NORMS = ("before", "after")


def _blocks(encoder: nn.Module) -> Sequence[nn.Module]:
    """Every transformer block of the library's own encoders is of this class, in order."""
    return [module for module in encoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _one(pixels: Tensor, config: Any) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


def _patches(pixels: Tensor, config: Any) -> dict[str, Tensor]:
    """(b, 3, H, W) -> what SigLIP2 reads: patches in rows (b, n, p p 3), channels last, none of them padding."""
    b, _, height, width = pixels.shape
    side = _side(config.patch_size)
    rows, columns = height // side, width // side
    cut = pixels[:, :, : rows * side, : columns * side].reshape(b, 3, rows, side, columns, side)
    return {
        "pixel_values": cut.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, side * side * 3),
        "pixel_attention_mask": torch.ones(b, rows * columns, dtype=torch.long, device=pixels.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * b, device=pixels.device),
    }


def _resize_table(encoder: Any, size: int) -> None:
    """AIMv2: its learned table of positions, bicubically from the trained grid to that of `size` pixels. The native ones
    compute theirs for any size."""
    if encoder.config.is_native:
        return
    embeddings = encoder.embeddings
    table: Tensor = embeddings.position_embedding.weight
    trained, asked = round(table.shape[0] ** 0.5), size // _side(encoder.config.patch_size)
    square = table.detach().float().T.reshape(1, -1, trained, trained)
    wide = F.interpolate(square, size=(asked, asked), mode="bicubic", align_corners=False, antialias=True)
    embeddings.position_embedding = nn.Embedding.from_pretrained(wide.flatten(2)[0].T.contiguous().to(table.dtype))
    embeddings.register_buffer(
        "position_ids", torch.arange(asked * asked, device=table.device).expand(1, -1), persistent=False
    )


@dataclass(frozen=True)
class Family:
    """One row.

    prefix: tokens before the patches. mean, std: of RGB in [0, 1], when the checkpoint does not say. call: what forward
    must be told, so that other resolutions than the trained one work. build: what the constructor must be told. set:
    config fields for a model without a head of its own. normed: the library's last_hidden_state is the last block's output
    after the final norm (CLIP's is not: there only the pooled token is normed). inputs: (pixels (b, 3, H, W), config) ->
    forward's arguments. blocks: the transformer blocks, in order. depth, width, patch, size: blocks, channels, side of a
    patch and of the trained image in pixels, from the config. fields: what a config is made again from. cut: config fields
    -> those of the first so many blocks. resize: for encoders that take their built size only, brings a loaded one to
    another; sized: config fields -> those of that size.
    """

    prefix: Callable[[Any], int]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    call: dict[str, Any] = field(default_factory=lambda: {"interpolate_pos_encoding": True})
    build: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    normed: Callable[[Any], bool] = lambda c: True
    inputs: Callable[[Tensor, Any], dict[str, Tensor]] = _one
    blocks: Callable[[Any], Sequence[nn.Module]] = _blocks
    depth: Callable[[Any], int] = lambda c: c.num_hidden_layers
    width: Callable[[Any], int] = lambda c: c.hidden_size
    patch: Callable[[Any], int] = lambda c: _side(c.patch_size)
    size: Callable[[Any], int] = lambda c: _side(c.image_size)
    fields: Callable[[Any], dict[str, Any]] = lambda c: c.to_dict()
    cut: Callable[[dict[str, Any], int], dict[str, Any]] = lambda fields, depth: {"num_hidden_layers": depth}
    resize: Callable[[Any, int], None] | None = None
    sized: Callable[[dict[str, Any], int], dict[str, Any]] = lambda fields, size: {"image_size": size}


def _native(**settings: Any) -> Family:
    """A family whose forward takes any resolution by itself."""
    return Family(call={}, **settings)


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(prefix=lambda c: 1, mean=CLIP_MEAN, std=CLIP_STD, normed=lambda c: False),
    "metaclip_2_vision_model": Family(prefix=lambda c: 1, mean=CLIP_MEAN, std=CLIP_STD, normed=lambda c: False),
    "siglip_vision_model": Family(prefix=lambda c: 0, mean=HALF, std=HALF, set={"vision_use_head": False}),
    "siglip2_vision_model": _native(
        prefix=lambda c: 0, mean=HALF, std=HALF, set={"vision_use_head": False}, inputs=_patches,
        size=lambda c: round(c.num_patches**0.5) * _side(c.patch_size),
    ),
    "dinov2": _native(prefix=lambda c: 1),
    "dinov2_with_registers": _native(prefix=lambda c: 1 + c.num_register_tokens),
    "dinov3_vit": _native(prefix=lambda c: 1 + c.num_register_tokens),
    "vit": Family(prefix=lambda c: 1, mean=HALF, std=HALF, build={"add_pooling_layer": False}),
    "deit": Family(prefix=lambda c: 2, build={"add_pooling_layer": False}),
    "aimv2_vision_model": _native(
        prefix=lambda c: 0, mean=CLIP_MEAN, std=CLIP_STD, set={"use_head": False}, resize=_resize_table
    ),
    # RADIO normalises by itself: it is given RGB in [0, 1]. It has no final norm.
    "radio": _native(
        prefix=lambda c: c.num_cls_tokens + c.num_registers, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
        normed=lambda c: False,
    ),
    "timm_wrapper": Family(
        prefix=timm.prefix, call={"do_pooling": False}, blocks=timm.blocks, depth=timm.depth, width=timm.width,
        patch=timm.patch, size=timm.size, fields=timm.fields, cut=timm.cut, resize=timm.resize, sized=timm.sized,
        normed=timm.normed,
    ),
}  # fmt: skip

READ_AS: dict[str, type[PreTrainedConfig]] = {"vit_mae": ViTConfig}
"""Checkpoints that are read as another family: MAE's own model shuffles its patches, even with nothing masked; a plain
ViT of the same weights does not."""


def family_of(config: PreTrainedConfig) -> Family:
    """The row of an encoder's config. Raises ValueError for a family that is not in the table."""
    return lookup(FAMILIES, config.model_type, what="encoder family")


def statistics(config: PreTrainedConfig) -> tuple[Triple, Triple]:
    """mean and std of RGB in [0, 1] that a checkpoint's config implies, before `vision_half` made it another's."""
    if config.model_type in READ_AS:
        return IMAGENET_MEAN, IMAGENET_STD
    if config.model_type == "timm_wrapper":
        return timm.statistics(config)
    family = family_of(vision_half(config))
    return family.mean, family.std


def vision_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that a checkpoint's image encoder is read with: the image half of a two-sided one (CLIP, SigLIP), a plain
    ViT for MAE; an encoder's own config comes back as it is."""
    half = config.vision_config if "vision_config" in config.sub_configs else config  # type: ignore[attr-defined]
    kind = READ_AS.get(half.model_type)
    if kind is None:
        return half
    known = kind().to_dict()
    shared = {name: value for name, value in half.to_dict().items() if name in known and name not in _DERIVED}
    return kind(**shared)


_DERIVED = ("stage_names", "out_features", "out_indices", "architectures", "dtype", "model_type")
"""Fields that follow from the others, or from where a config is used."""


def truncate(config: PreTrainedConfig, depth: int, *, image_size: int | None = None) -> PreTrainedConfig:
    """A copy of an encoder's config with its first `depth` blocks only and nothing after them.

    image_size: side in pixels that an encoder of a fixed size is built for; None is its own.
    """
    family = family_of(config)
    fields = {name: value for name, value in family.fields(config).items() if name not in _DERIVED}
    fields |= {**family.set, "tie_last_hidden_states": False, **family.cut(fields, depth)}
    if family.resize is not None and image_size is not None:
        fields |= family.sized(fields, image_size)
    return type(config)(**fields)


def trained_size(config: PreTrainedConfig) -> int:
    """The side in pixels of the square images that the encoder was trained on."""
    return family_of(config).size(config)


def grid(config: PreTrainedConfig, image_size: int, *, name: str) -> tuple[int, int]:
    """Rows and columns of patch tokens of a square image of `image_size` pixels.

    name: the encoder's, for the error. Raises ValueError when the patch size does not divide the image size, unless the
    encoder was trained on just that size (SigLIP's 384 by 14: 27 patches, 6 pixels unseen).
    """
    side = family_of(config).patch(config)
    if image_size < side or (image_size % side and image_size != trained_size(config)):
        below = max(image_size // side, 1) * side
        raise ValueError(
            f"encoder {name!r}: image_size {image_size} is not a multiple of its patch size {side}; "
            f"set image_size to {below} or {below + side}"
        )
    return image_size // side, image_size // side
