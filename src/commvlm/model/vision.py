"""The visual half as a model: every encoder's layers into its branch as they come, then fuse, then reduce."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from .branches import Branch, make_fuse, make_reduce
from .config import CommVisionConfig
from .encoders import new_encoder, read_layers, stream_layers
from .families import family_of
from .knock_out import KnockOut, parse_knock_out
from .merge import Layerscale
from .merge_more import LayerAttention


def initialise(module: nn.Module) -> None:
    """First values of a trained module between encoders and language model, as torch gives them.

    They scale with a layer's width; the library's constant 0.02 makes narrow layers nearly silent. Weights that came
    from a checkpoint are left alone.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        bound = module.weight[0].numel() ** -0.5
        init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
        init.ones_(module.weight)
        init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            init.zeros_(module.running_mean)  # pyright: ignore[reportArgumentType]
            init.ones_(module.running_var)  # pyright: ignore[reportArgumentType]
            init.zeros_(module.num_batches_tracked)  # pyright: ignore[reportArgumentType]
    elif isinstance(module, Layerscale):
        init.constant_(module.logits, module.first_logit)
        if isinstance(module, LayerAttention):
            init.zeros_(module.queries)


def learns(norm: nn.BatchNorm2d) -> bool:
    """Whether a BatchNorm is trained; the statistics of one that is not are a part of its frozen weights."""
    return any(parameter.requires_grad for parameter in norm.parameters())


@contextmanager
def by_batch(module: nn.Module) -> Iterator[None]:
    """BatchNorms that learn go by the batch, and what they have gathered stays as it is."""
    norms = [inner for inner in module.modules() if isinstance(inner, nn.BatchNorm2d) and learns(inner)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracks


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
        branches: list[Branch] = config.make_branches() if config.branches else []
        for (
            name
        ) in config.names:  # in the dtype that this model is made in, whatever the encoder's own config was saved with
            self.add_module(f"enc_{name}", new_encoder(config.encoder_config(name), dtype=torch.get_default_dtype()))
        self.branches = nn.ModuleDict(dict(zip(config.names, branches, strict=True)))
        self.fuse = make_fuse(config.fuse, branches)  # type: ignore[arg-type]
        self.reduce = make_reduce(config.reduce, self.fuse.out)  # type: ignore[arg-type]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)

    def encoder(self, name: str) -> PreTrainedModel:
        """One encoder, by its name."""
        return self.get_submodule(f"enc_{name}")  # type: ignore[return-value]

    def train(self, mode: bool = True) -> CommVisionModel:
        """Encoders stay frozen, in eval mode, whatever the rest does; adapters beside their weights (peft's) may learn.
        BatchNorms without a gradient stay in eval mode, too."""
        super().train(mode)
        for name in self.config.names:
            for key, parameter in self.encoder(name).eval().named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".lora_" in key)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not learns(module):
                module.eval()
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

    def stored_shapes(self) -> list[tuple[int, int, int]]:
        """[encoder](layers, N, d): what a store keeps of an image."""
        shapes = []
        for branch in self.config.branches or []:
            rows, columns = self.config.grid_of(branch["name"])
            config = self.config.encoder_config(branch["name"])
            shapes.append((len(branch["layers"]), rows * columns, family_of(config).width(config)))
        return shapes

    def split_features(self, features: Tensor) -> list[Tensor]:
        """(images, 1, F) -> [encoder](images, layers, N, d): what a store kept of the asked layers. Raises ValueError on
        another F."""
        shapes = self.stored_shapes()
        sizes = [prod(shape) for shape in shapes]
        if features.shape[1:] != (1, sum(sizes)):
            raise ValueError(
                f"stored features are {tuple(features.shape)}, but the encoders {', '.join(self.config.names)} need "
                f"(images, 1, {sum(sizes)}); read them from a store of this model's layers"
            )
        pieces = features.squeeze(1).split(sizes, dim=1)
        return [piece.view(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def read(self, pixel_values: Tensor) -> dict[str, list[Tensor]]:
        """Every encoder's asked layers: name -> [layer](images, N, d), outside any graph."""
        states = {}
        for branch, pixels in zip(self.config.branches or [], self.split_pixels(pixel_values), strict=True):
            encoder = self.encoder(branch["name"])
            states[branch["name"]] = read_layers(
                encoder, pixels.to(encoder.dtype), layers=branch["layers"], final_norm=branch["final_norm"]
            )
        return states

    def branch_tokens(self, setting: dict[str, Any], pixels: Tensor, off: frozenset[int]) -> Tensor:
        """One branch: pixels (images, 3, S, S) -> (images, n, d), each layer merged as its block finishes."""
        encoder, branch = self.encoder(setting["name"]), self.branches[setting["name"]]
        fold = branch.fold(off)  # type: ignore[operator]
        stream_layers(
            encoder,
            pixels.to(encoder.dtype),
            layers=setting["layers"],
            take=fold.take,
            final_norm=setting["final_norm"],
        )
        return branch.finish(fold.result())  # type: ignore[operator]

    def stored_tokens(self, setting: dict[str, Any], states: Tensor, off: frozenset[int]) -> Tensor:
        """One branch whose encoder ran before: states (images, layers, N, d) -> (images, n, d)."""
        weights = [*self.branches.parameters(), *self.fuse.parameters(), *self.encoder(setting["name"]).parameters()]
        first = next(p for p in weights if p.is_floating_point())
        # Shards of an encoder that is not run are not what the others compute in; FSDP's root has cast the states to that.
        dtype = states.dtype if isinstance(first, DTensor) else first.dtype
        return self.branches[setting["name"]]([state.to(dtype) for state in states.unbind(1)], off)

    def forward(self, pixel_values: Tensor, knock_out: KnockOut | None = None, **kwargs: Any) -> BaseModelOutput:
        """(images, P) -> last_hidden_state (images, N, hidden_size).

        pixel_values: pixels, or (images, 1, F), the asked layers' tokens from a feature store; then no encoder is run.

        knock_out: encoders and layers that are switched off, such as "dinov2" or ["clip:1-8"]; the weights of the layers that
        stay are made larger to the same sum, an encoder that is off is not run. Raises ValueError for what there is not.
        """
        off = self.off(knock_out)
        stored = pixel_values.ndim == 3
        given = self.split_features(pixel_values) if stored else self.split_pixels(pixel_values)
        branch_of = self.stored_tokens if stored else self.branch_tokens
        tokens = []
        for setting, part in zip(self.config.branches or [], given, strict=True):
            places = off[setting["name"]]
            every = len(places) == len(setting["layers"])
            tokens.append(None if every else branch_of(setting, part, places))
        return BaseModelOutput(last_hidden_state=self.reduce(self.fuse(tokens)))

    def off(self, knock_out: KnockOut | None) -> dict[str, frozenset[int]]:
        """What is switched off: see `knock_out.parse_knock_out`."""
        branches = self.config.branches or []
        layers = {branch["name"]: branch["layers"] for branch in branches}
        return parse_knock_out(knock_out, layers, {branch["name"]: branch["depth"] for branch in branches})

    @torch.no_grad()
    def layer_weights(self) -> dict[str, dict[int, float]]:
        """Each encoder's layer weights as they are now: name -> {layer number: weight}; empty for a merge without any."""
        weights = {}
        for branch in self.config.branches or []:
            merge: Any = self.branches[branch["name"]].merge
            values = [] if merge.weights is None else merge.weights.tolist()
            weights[branch["name"]] = dict(zip(branch["layers"], values, strict=False))
        return weights
