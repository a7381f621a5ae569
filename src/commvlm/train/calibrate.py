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


@torch.no_grad()
def scale_visual_tokens(model: CommForConditionalGeneration, pixel_values: Tensor, *, scale: float) -> float:
    """Multiplies the projection's last Linear so that the root mean square of visual tokens is `scale` times that of the
    word embeddings; returns the factor. pixel_values: (images, P) of a batch to measure on."""
    features: Any = model.get_image_features(pixel_values, return_dict=True).pooler_output
    tokens = torch.cat(features).float()
    embeddings: Any = model.get_input_embeddings()
    words = embeddings.weight.float()
    factor = scale * (words.pow(2).mean().sqrt() / tokens.pow(2).mean().sqrt()).item()
    last = [m for m in model.model.multi_modal_projector.modules() if isinstance(m, nn.Linear)][-1]
    for parameter in last.parameters():
        parameter.mul_(factor)
    return factor
