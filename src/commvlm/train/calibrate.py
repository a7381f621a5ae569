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
    """Centres the visual tokens, and multiplies the projection's last Linear so that their root mean square is `scale` times
    that of the word embeddings; returns the factor. pixel_values: (images, P) of a batch to measure on.

    What all tokens of an encoder have in common says nothing, and in some encoders it is most of a token: scaled without
    being taken out first, it would drown what tells them apart. A Linear without bias is scaled alone.
    """
    features: Any = model.get_image_features(pixel_values, return_dict=True).pooler_output
    tokens = torch.cat(features).float()
    embeddings: Any = model.get_input_embeddings()
    words = embeddings.weight.float()
    last = [m for m in model.model.multi_modal_projector.modules() if isinstance(m, nn.Linear)][-1]
    if last.bias is not None:
        mean = tokens.mean(0)
        tokens = tokens - mean
        last.bias.sub_(mean.to(last.bias.dtype))
    factor = scale * (words.pow(2).mean().sqrt() / tokens.pow(2).mean().sqrt()).item()
    for parameter in last.parameters():
        parameter.mul_(factor)
    return factor
