"""The visual branches: encoder -> merge -> align, then fuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from .config import CommVisionConfig
from .encoders import freeze, new_encoder, read_layers
from .merge import ALIGNS, FUSES, MERGES, LLNLayerscale


def without_kind(spec: dict[str, Any]) -> dict[str, Any]:
    """The options of a settled choice."""
    return {name: value for name, value in spec.items() if name != "kind"}


def initialise(module: nn.Module) -> None:
    """First values of a trained module between encoders and language model, as torch gives them.

    They scale with a layer's width; the library's constant 0.02 makes narrow layers nearly silent. Weights that came
    from a checkpoint are left alone.
    """
    if isinstance(module, nn.Linear):
        bound = module.in_features**-0.5
        init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, LLNLayerscale):
        init.constant_(module.logits, module.first_logit)


class Branch(nn.Module):
    """What is trained of one encoder's branch: merge -> align."""

    def __init__(self, *, layers: int, dim: int, merge: dict[str, Any], align: dict[str, Any]):
        super().__init__()
        self.merge = MERGES[merge["kind"]](layers, dim, **without_kind(merge))
        self.align = ALIGNS[align["kind"]](dim, **without_kind(align))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """[layer](b n d) -> (b n d)."""
        return self.align(self.merge(states))


class CommVisionModel(PreTrainedModel):
    """Frozen encoders, their branches, fused: pixel_values (images, P) -> (images, N, hidden_size).

    Each encoder is a direct child called `enc_NAME`, which the library needs to find what it may not split.
    """

    config_class = CommVisionConfig
    config: CommVisionConfig
    base_model_prefix = "vision"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CommVisionConfig):
        super().__init__(config)
        self.branches = nn.ModuleDict()
        for branch in config.branches or []:
            name = branch["name"]
            encoder_config = config.encoder_config(name)
            self.add_module(f"enc_{name}", new_encoder(encoder_config))
            self.branches[name] = Branch(
                layers=len(branch["layers"]),
                dim=encoder_config.hidden_size,  # type: ignore[attr-defined]
                merge=branch["merge"],
                align=branch["align"],
            )
        fuse: dict[str, Any] = config.fuse  # type: ignore[assignment]
        dims = [config.encoder_config(name).hidden_size for name in config.names]  # type: ignore[attr-defined]
        self.fuse = FUSES[fuse["kind"]](dims, **without_kind(fuse))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)

    def encoder(self, name: str) -> PreTrainedModel:
        """One encoder, by its name."""
        return self.get_submodule(f"enc_{name}")  # type: ignore[return-value]

    def train(self, mode: bool = True) -> CommVisionModel:
        """Encoders stay frozen, in eval mode, whatever the rest does."""
        super().train(mode)
        for name in self.config.names:
            freeze(self.encoder(name))
        return self

    def split_pixels(self, pixel_values: Tensor) -> list[Tensor]:
        """(images, P) -> [encoder](images, 3, S, S), views of the same memory. Raises ValueError on another P."""
        if pixel_values.ndim != 2 or pixel_values.shape[1] != self.config.pixels_per_image:
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, but the encoders {', '.join(self.config.names)} need "
                f"(images, {self.config.pixels_per_image}); prepare images with this model's own processor"
            )
        sizes = self.config.image_sizes
        pieces = pixel_values.split([3 * size * size for size in sizes], dim=1)
        return [piece.view(-1, 3, size, size) for piece, size in zip(pieces, sizes, strict=True)]

    def read(self, pixel_values: Tensor) -> dict[str, list[Tensor]]:
        """Every encoder's asked layers: name -> [layer](images, N, d), outside any graph."""
        states = {}
        for branch, pixels in zip(self.config.branches or [], self.split_pixels(pixel_values), strict=True):
            encoder = self.encoder(branch["name"])
            states[branch["name"]] = read_layers(
                encoder, pixels.to(encoder.dtype), layers=branch["layers"], final_norm=branch["final_norm"]
            )
        return states

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """(images, P) -> last_hidden_state (images, N, hidden_size)."""
        states = self.read(pixel_values)
        tokens = [branch(states[name]) for name, branch in self.branches.items()]
        return BaseModelOutput(last_hidden_state=self.fuse(tokens))

    @torch.no_grad()
    def layer_weights(self) -> dict[str, dict[int, float]]:
        """Each encoder's layer weights as they are now: name -> {layer number: weight}."""
        weights = {}
        for branch in self.config.branches or []:
            merge: Any = self.branches[branch["name"]].merge
            weights[branch["name"]] = dict(zip(branch["layers"], merge.weights.tolist(), strict=True))
        return weights
