"""A frozen encoder with everything that decides what it gives of an image: the layers, the size, how the image is shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from .build import make_encoder
from .config import CommVisionConfig
from .encoders import stream_layers
from .families import family_of
from .processing import CommImageProcessor
from .spec import EncoderSpec, vision_config
from .tokens import Grid
from .vision import CommVisionModel

USES = (
    "hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_norm_eps", "rms_norm_eps", "rope_theta",
    "rope_parameters", "pos_embed_rescale", "architecture",
)  # fmt: skip
"""Fields of an encoder's config that change what its weights give, and leave their shapes as they are."""
COMPUTED = ("fp32", "bf16")
"""How an encoder is run: in float32, or under bfloat16 autocast as training does it."""


@dataclass(frozen=True)
class FrozenEncoder:
    """name: its own. encoder: as deep as the deepest of `layers` (ascending, 1-based). depth: blocks of the whole encoder.
    grid: rows and columns of patches. images: the processor of this encoder alone: its size, mean, std, and the geometry.
    final_norm: see `encoders.stream_layers`."""

    name: str
    encoder: PreTrainedModel
    layers: tuple[int, ...]
    depth: int
    grid: Grid
    images: CommImageProcessor
    final_norm: str = "before"

    @property
    def dim(self) -> int:
        """Channels of a patch token."""
        return family_of(self.encoder.config).width(self.encoder.config)

    @property
    def patches(self) -> int:
        """Patch tokens of an image."""
        return self.grid[0] * self.grid[1]

    def stream(
        self, images: Sequence[Image.Image], take: Callable[[int, Tensor], None], *, computed: str = "fp32"
    ) -> None:
        """Hands over each layer's patch tokens (images, N, d) as its block finishes: take(0-based place, tokens)."""
        size = self.images.encoders[0]["size"]
        rows = self.images.preprocess(list(images), return_tensors="pt")["pixel_values"]
        device = self.encoder.device
        pixels = rows.view(-1, 3, size, size).to(device, self.encoder.dtype)
        rounded = torch.autocast(device.type, dtype=torch.bfloat16) if computed == "bf16" else nullcontext()
        with torch.no_grad(), rounded:
            stream_layers(self.encoder, pixels, layers=self.layers, take=take, final_norm=self.final_norm)

    def read(self, images: Sequence[Image.Image], *, computed: str = "fp32") -> Tensor:
        """(images, layers, N, d) float32 on the CPU."""
        out = torch.empty(len(images), len(self.layers), self.patches, self.dim)

        def take(place: int, state: Tensor) -> None:
            out[:, place].copy_(state)

        self.stream(images, take, computed=computed)
        return out

    def identity(self) -> dict[str, Any]:
        """What its features depend on, as plain values: hashes of the weights, block by block, the layers, and how an image
        is shown. Two encoders that share their first blocks share those blocks' hashes, however deep each was built."""
        shown = self.images.encoders[0]
        return {
            "weights": weight_hashes(self.encoder),
            "computation": computation(self.encoder.config),
            "layers": list(self.layers),
            "final_norm": self.final_norm,
            "image_size": shown["size"],
            "mean": [float(value) for value in shown["mean"]],
            "std": [float(value) for value in shown["std"]],
            "geometry": self.images.geometry,
            "pad_color": list(self.images.pad_color),
        }


def computation(config: Any) -> dict[str, Any]:
    """What the config says of how the weights are used, as far as weights of one shape can be used in several ways."""
    said = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: said[name] for name in USES if said.get(name) is not None}


def weight_hashes(encoder: PreTrainedModel) -> dict[str, Any]:
    """{"blocks": one hash per block, "rest": of everything else}: of names, shapes and values as float32."""
    blocks = list(family_of(encoder.config).blocks(encoder))
    inside = {id(tensor) for block in blocks for tensor in block.state_dict(keep_vars=True).values()}
    rest = {name: t for name, t in encoder.state_dict(keep_vars=True).items() if id(t) not in inside}
    return {"blocks": [_hash(block.state_dict()) for block in blocks], "rest": _hash(rest)}


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        values = (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """Why features of identity `stored` are not those of `asked`, in words; None where they are, or hold them."""
    for name in ("image_size", "mean", "std", "geometry", "pad_color", "final_norm"):
        if stored[name] != asked[name]:
            return f"{name} {stored[name]} there, {asked[name]} now"
    there, now = stored.get("computation", asked["computation"]), asked["computation"]  # older stores do not say it
    for name in sorted({*there, *now}):
        if there.get(name) != now.get(name):
            return f"{name} {there.get(name)} there, {now.get(name)} now"
    deepest = max(asked["layers"])
    there, now = stored["weights"], asked["weights"]
    if there["rest"] != now["rest"]:
        return f"other weights: {there['rest'][:8]} there, {now['rest'][:8]} now"
    for k, (a, b) in enumerate(zip(there["blocks"], now["blocks"], strict=False)):
        if a != b:
            return f"other weights in block {k + 1}: {a[:8]} there, {b[:8]} now"
    lacking = [layer for layer in asked["layers"] if layer not in stored["layers"]]
    if lacking:
        return f"layer {lacking[0]} is not there, only {stored['layers']}"
    if asked["final_norm"] == "after" and deepest != max(stored["layers"]):
        return f"final_norm after layer {max(stored['layers'])} there, after {deepest} now"
    return None


def open_frozen(
    spec: EncoderSpec,
    *,
    geometry: str = "pad-square",
    pad_color: Sequence[int] = (255, 255, 255),
    seed: int = 0,
    device: str = "cpu",
) -> FrozenEncoder:
    """An encoder by its checkpoint's name or folder, or with random weights; its merge and align play no part.

    seed: of random weights. Raises CheckpointError and ValueError as `build.build_model` does.
    """
    config = vision_config([spec], fuse="channel-concat", reduce="none", language_width=1)
    with torch.random.fork_rng(devices=[]):
        encoder = make_encoder(spec, config.encoder_config(spec.name), seed=seed).to(device)  # pyright: ignore[reportArgumentType]
    return _frozen(config, encoder, 0, geometry=geometry, pad_color=pad_color)


def frozen_of(model: CommVisionModel, images: CommImageProcessor) -> list[FrozenEncoder]:
    """A model's encoders, in order, as its image processor shows them images."""
    settings = {"geometry": images.geometry, "pad_color": images.pad_color}
    return [_frozen(model.config, model.encoder(name), k, **settings) for k, name in enumerate(model.config.names)]


def _frozen(config: CommVisionConfig, encoder: PreTrainedModel, place: int, **shown: Any) -> FrozenEncoder:
    branch = (config.branches or [])[place]
    name = branch["name"]
    mine = {"name": name, "size": branch["image_size"], "mean": branch["mean"], "std": branch["std"]}
    images = CommImageProcessor([mine], **shown)
    return FrozenEncoder(
        name,
        encoder,
        tuple(branch["layers"]),
        branch["depth"],
        config.grid_of(name),
        images,
        final_norm=branch["final_norm"],
    )
