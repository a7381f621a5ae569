"""A start for the projection: visual tokens as loud as words.

A language model's words have a size that its first layer expects; a fresh projection's tokens may be ten times quieter,
and the first hundreds of updates then go into growing. One factor on the projection, from one batch, mends it (data-
dependent initialisation, as in Mishkin and Matas, "All you need is a good init", arXiv 1511.06422).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model.modeling import CommForConditionalGeneration
from ..model.vision import by_batch


@torch.no_grad()
def scale_visual_tokens(model: CommForConditionalGeneration, pixel_values: Tensor, *, scale: float) -> float:
    """Multiplies the projection's last Linear so that the root mean square of visual tokens is `scale` times that of the
    word embeddings; returns the factor. Where the projection has none (`identity`), it is the last one of each encoder's
    alignment. pixel_values: (images, P) of a batch to measure on, by whose statistics BatchNorms (Conv-Layerscale's) measure,
    as they will in training. Raises ValueError where nothing can be scaled."""
    with by_batch(model.model.vision_tower):
        features: Any = model.get_image_features(pixel_values, return_dict=True).pooler_output
    tokens = torch.cat(features).float()
    embeddings: Any = model.get_input_embeddings()
    words = embeddings.weight.float()
    factor = scale * (words.pow(2).mean().sqrt() / tokens.pow(2).mean().sqrt()).item()
    for linear in _last_linears(model):
        for parameter in linear.parameters():
            parameter.mul_(factor)
    return factor


def _last_linears(model: CommForConditionalGeneration) -> list[nn.Linear]:
    if last := _linears(model.model.multi_modal_projector)[-1:]:
        return last
    branches = model.model.vision_tower.branches
    for name, branch in branches.items():
        if not _linears(branch.align):  # type: ignore[arg-type]
            raise ValueError(
                f"train.visual_scale has no linear map to scale: model.project is identity and encoder {name} is aligned by "
                "none; leave train.visual_scale out"
            )
    return [_linears(branch.align)[-1] for branch in branches.values()]  # type: ignore[arg-type]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [inner for inner in module.modules() if isinstance(inner, nn.Linear)]
