"""One contract for every encoder: pixels -> patch tokens of the asked layers.

The only place that touches the library's encoders. Layer k is what the k-th block gives out, before the encoder's final
norm, its prefix tokens (CLS, registers) removed. A new family is one row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from .names import choice, lookup

Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)

FINAL_NORMS = ("before", "after")


@dataclass(frozen=True)
class Family:
    """What differs between the library's encoders.

    prefix: tokens before the patches, from the config. mean, std: of RGB in [0, 1], when the checkpoint does not say.
    call: what forward must be told, so that other resolutions than the trained one work. build: what the constructor
    must be told. set: config fields for a model without a head of its own. normed: the library's last_hidden_state is
    the last block's output after the final norm (CLIP's is not: there only the pooled token is normed).
    """

    prefix: Callable[[Any], int]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    call: dict[str, Any] = field(default_factory=lambda: {"interpolate_pos_encoding": True})
    build: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    normed: bool = True


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(prefix=lambda c: 1, mean=CLIP_MEAN, std=CLIP_STD, normed=False),
    "dinov2": Family(prefix=lambda c: 1, call={}),
    "dinov2_with_registers": Family(prefix=lambda c: 1 + c.num_register_tokens, call={}),
    "siglip_vision_model": Family(prefix=lambda c: 0, mean=HALF, std=HALF, set={"vision_use_head": False}),
    "vit": Family(prefix=lambda c: 1, mean=HALF, std=HALF, build={"add_pooling_layer": False}),
    "deit": Family(prefix=lambda c: 2, build={"add_pooling_layer": False}),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The row of an encoder's config. Raises ValueError for a family that is not in the table."""
    return lookup(FAMILIES, config.model_type, what="encoder family")


def vision_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """The image encoder's config out of a two-sided one (CLIP, SigLIP); an encoder's own config comes back as it is."""
    return config.vision_config if "vision_config" in config.sub_configs else config  # type: ignore[attr-defined]


def truncate(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """A copy of an encoder's config with its first `depth` blocks only and nothing after them."""
    family = family_of(config)
    derived = ("stage_names", "out_features", "out_indices", "architectures", "dtype")  # these follow from the rest
    fields = {name: value for name, value in config.to_dict().items() if name not in derived}
    fields.update(family.set, num_hidden_layers=depth, tie_last_hidden_states=False)
    return type(config)(**{name: value for name, value in fields.items() if name != "model_type"})


def grid(config: PreTrainedConfig, image_size: int, *, name: str) -> tuple[int, int]:
    """Rows and columns of patch tokens of a square image of `image_size` pixels.

    name: the encoder's, for the error. Raises ValueError when the patch size does not divide the image size.
    """
    patch = config.patch_size  # type: ignore[attr-defined]
    side = int(patch[0] if isinstance(patch, list | tuple) else patch)
    if image_size <= 0 or image_size % side:
        below = max(image_size // side, 1) * side
        raise ValueError(
            f"encoder {name!r}: image_size {image_size} is not a multiple of its patch size {side}; "
            f"set image_size to {below} or {below + side}"
        )
    return image_size // side, image_size // side


def trained_size(config: PreTrainedConfig) -> int:
    """The side in pixels of the square images that the encoder was trained on."""
    size = config.image_size  # type: ignore[attr-defined]
    return int(size[0] if isinstance(size, list | tuple) else size)


def check_final_norm(config: PreTrainedConfig, final_norm: str, *, name: str, deepest: int, depth: int) -> None:
    """Raises ValueError when "after" is asked where it cannot be given.

    deepest: the deepest asked layer. depth: blocks of the whole encoder, of which `config` may have fewer.
    """
    if choice(final_norm, of=FINAL_NORMS, what=f"final_norm of encoder {name!r}") == "before":
        return
    if not family_of(config).normed:
        raise ValueError(
            f"encoder {name!r}: final_norm 'after' is not available for {config.model_type}, whose final norm is for "
            "the pooled token only; use final_norm 'before'"
        )
    if deepest != depth:
        raise ValueError(
            f"encoder {name!r}: final_norm 'after' needs the last layer, {depth}, but the deepest asked one is "
            f"{deepest}; add the last layer or use final_norm 'before'"
        )


def new_encoder(config: PreTrainedConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A frozen encoder with random weights. dtype: None is what the config says, or else torch's default."""
    options = dict(family_of(config).build) if dtype is None else {**family_of(config).build, "dtype": dtype}
    return freeze(AutoModel.from_config(config, **options))


def load_encoder(checkpoint: str, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen encoder with the weights of `checkpoint` (hub id or folder; safetensors), as deep as `config` says.

    Raises ValueError when the checkpoint lacks any weight of the encoder.
    """
    encoder, report = AutoModel.from_pretrained(
        checkpoint,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported, and refused below
        output_loading_info=True,
        **family_of(config).build,
    )
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"checkpoint {checkpoint!r} lacks {len(lacking)} weights of a {config.model_type} encoder "
            f"(first: {lacking[0]}); check that its config.json belongs to its weights"
        )
    return freeze(encoder)


def freeze(encoder: PreTrainedModel) -> PreTrainedModel:
    """The encoder itself, in eval mode, none of its parameters trained."""
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def read_layers(
    encoder: PreTrainedModel, pixels: Tensor, *, layers: Sequence[int], final_norm: str = "before"
) -> list[Tensor]:
    """Patch tokens of the asked layers.

    pixels: (b, 3, H, W), normalised for this encoder. layers: ascending, 1-based; the encoder has no block beyond the
    last of them. final_norm: "after" puts the last of them through the encoder's final norm.
    Returns [layer](b, n, d), n = rows x columns of patches, never part of a graph.
    """
    family = family_of(encoder.config)
    # In the library's list form, entry k of hidden_states is the k-th block's output (entry 0 the first one's input).
    output = encoder(pixel_values=pixels, output_hidden_states=list(layers), return_dict=True, **family.call)
    states = [output.hidden_states[layer] for layer in layers]
    if final_norm == "after":
        states[-1] = output.last_hidden_state
    prefix = family.prefix(encoder.config)
    return [state[:, prefix:] for state in states]
