"""Encoders of timm (EVA-CLIP, DeiT III and all of its plain vision transformers) through the library's wrapper.

A timm checkpoint's config names an architecture and little else; what it is made of is read off the model itself, once, on
the meta device. Needs the extra `timm`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Anatomy:
    """Blocks, channels, side of a patch and of the image in pixels, tokens before the patches; whether patches are normed
    behind the last block (where timm pools by the mean, the norm stands behind that)."""

    depth: int
    width: int
    patch: int
    size: int
    prefix: int
    normed: bool


def require_timm() -> None:
    """Raises ValueError, naming the extra, where timm cannot be imported."""
    try:
        import timm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"encoders of timm need the extra: pip install 'commvlm[timm]' ({str(error).splitlines()[0][:100]})"
        ) from error


@cache
def _anatomy(architecture: str, model_args: str) -> Anatomy:
    require_timm()
    import timm  # pyright: ignore[reportMissingImports]

    try:
        with torch.device("meta"):
            model: Any = timm.create_model(architecture, pretrained=False, num_classes=0, **json.loads(model_args))
        patch, size = model.patch_embed.patch_size, model.patch_embed.img_size
        normed = not isinstance(model.norm, nn.Identity)
        return Anatomy(len(model.blocks), model.embed_dim, patch[0], size[0], model.num_prefix_tokens, normed)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"timm's {architecture!r} is no plain vision transformer that can be read ({str(error).splitlines()[0][:120]})"
        ) from error


def _of(config: Any) -> Anatomy:
    return _anatomy(config.architecture, json.dumps(config.model_args or {}, sort_keys=True))


def prefix(config: Any) -> int:
    """Tokens before the patches."""
    return _of(config).prefix


def normed(config: Any) -> bool:
    """Whether patch tokens go through a final norm."""
    return _of(config).normed


def depth(config: Any) -> int:
    """Blocks."""
    return _of(config).depth


def width(config: Any) -> int:
    """Channels."""
    return _of(config).width


def patch(config: Any) -> int:
    """Side of a patch in pixels."""
    return _of(config).patch


def size(config: Any) -> int:
    """Side in pixels of the image that the model is built for."""
    return _of(config).size


def statistics(config: Any) -> tuple[Triple, Triple]:
    """mean and std of RGB in [0, 1]: the checkpoint's own, or those of the architecture's default weights."""
    require_timm()
    import timm  # pyright: ignore[reportMissingImports]

    given: dict[str, Any] = config.to_dict().get("pretrained_cfg") or {}
    if "mean" not in given:
        default = timm.get_pretrained_cfg(config.architecture)
        given = default.to_dict() if default is not None else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return _triple(given["mean"]), _triple(given["std"])


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = values
    return red, green, blue


def blocks(encoder: Any) -> Sequence[nn.Module]:
    """The transformer blocks, in order."""
    return list(encoder.timm_model.blocks)


def fields(config: Any) -> dict[str, Any]:
    """What a wrapper's config is made again from: its labels are not."""
    return {"architecture": config.architecture, "model_args": dict(config.model_args or {}), "do_pooling": False}


def cut(fields: dict[str, Any], depth: int) -> dict[str, Any]:
    """The fields of the first `depth` blocks."""
    return {"model_args": {**fields["model_args"], "depth": depth}}


def sized(fields: dict[str, Any], size: int) -> dict[str, Any]:
    """The fields of a model built for images of `size` pixels."""
    return {"model_args": {**fields["model_args"], "img_size": size}}


def resize(encoder: Any, size: int) -> None:
    """timm's own interpolation of positions."""
    encoder.timm_model.set_input_size(img_size=size)
