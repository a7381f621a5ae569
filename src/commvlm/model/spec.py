"""What a model is made of, by named checkpoints, and the config that follows; no weight is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig

from .checkpoints import Checkpoint, CheckpointError, find_checkpoint
from .config import CommConfig, CommVisionConfig
from .families import family_of, grid, statistics, trained_size, truncate, vision_half
from .layers import LayerSpec, parse_layers
from .names import choice

WEIGHTS = ("checkpoint", "random")


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder's branch.

    name: its own, such as "clip". checkpoint: hub id or folder. layers: see `layers.parse_layers`. merge, align: a
    kind, or {"kind": ..., options}. image_size: side in pixels of its image; None is what it was trained on. weights:
    "checkpoint", or "random" for its random twin. final_norm: "before" or "after", for its last block.
    """

    name: str
    checkpoint: str
    layers: LayerSpec = "all"
    merge: str | Mapping[str, Any] = "lln-layerscale"
    align: str | Mapping[str, Any] = "identity"
    image_size: int | None = None
    weights: str = "checkpoint"
    final_norm: str = "before"


def build_config(
    encoders: Sequence[EncoderSpec],
    *,
    language_model: str,
    fuse: str | Mapping[str, Any] = "channel-concat",
    reduce: str | Mapping[str, Any] = "none",
    project: str | Mapping[str, Any] = "linear",
    frame: str = "none",
    image_token_id: int | None = None,
    vocab_size: int | None = None,
    geometry: str = "pad-square",
    pad_color: Sequence[int] = (255, 255, 255),
) -> CommConfig:
    """The config alone, from the checkpoints' configs; no weight is read.

    image_token_id: None appends one token to the language model's vocabulary. vocab_size: rows of the embedding; None
    keeps the language model's, or as many more as the image token needs. Raises ValueError for what does not fit.
    """
    if not encoders:
        raise ValueError("a model needs at least one encoder")
    text = copy.deepcopy(text_half(find_checkpoint(language_model)))
    token = text.vocab_size if image_token_id is None else image_token_id  # type: ignore[attr-defined]
    text.vocab_size = max(text.vocab_size, token + 1, vocab_size or 0)  # type: ignore[attr-defined]
    return CommConfig(
        vision_config=vision_config(
            encoders,
            fuse=_plain(fuse),
            reduce=_plain(reduce),
            language_width=text.hidden_size,  # type: ignore[attr-defined]
        ),
        text_config=text,
        project=_plain(project),
        frame=frame,
        image_token_id=token,
        geometry=geometry,
        pad_color=list(pad_color),
    )


def _plain(spec: str | Mapping[str, Any]) -> str | dict[str, Any]:
    return spec if isinstance(spec, str) else dict(spec)


def text_half(checkpoint: Checkpoint) -> PreTrainedConfig:
    """A causal language model's config. Raises CheckpointError for a checkpoint of another kind."""
    config = checkpoint.config
    if type(config) not in AutoModelForCausalLM._model_mapping:  # pyright: ignore[reportAttributeAccessIssue]
        raise CheckpointError(
            f"language model {checkpoint.name!r} is a {config.model_type}, not a causal language model; "
            "give one such as 'lmsys/vicuna-7b-v1.5'"
        )
    return config


def depth_of(checkpoint: str) -> int:
    """Blocks of an encoder, one at least. Raises CheckpointError for a checkpoint that there is not or that has none,
    ValueError for one of another kind."""
    whole = vision_half(find_checkpoint(checkpoint).config)
    depth = family_of(whole).depth(whole)
    if depth < 1:
        raise CheckpointError(f"checkpoint {checkpoint!r} has {depth} blocks: there is no layer to read")
    return depth


def vision_config(encoders: Sequence[EncoderSpec], *, fuse: Any, reduce: Any, language_width: int) -> CommVisionConfig:
    """The visual half alone. language_width: what `out: language-model` of an align stands for."""
    branches, configs = [], {}
    for spec in encoders:
        choice(spec.weights, of=WEIGHTS, what=f"weights of encoder {spec.name!r}")
        checkpoint = find_checkpoint(spec.checkpoint)
        whole = vision_half(checkpoint.config)
        depth = family_of(whole).depth(whole)
        try:
            layers = parse_layers(spec.layers, depth)
        except ValueError as error:
            raise ValueError(f"encoder {spec.name!r} ({spec.checkpoint}): {error}") from error
        size = spec.image_size if spec.image_size is not None else trained_size(whole)
        grid(whole, size, name=spec.name)
        mean, std = statistics(checkpoint.config)
        configs[spec.name] = truncate(whole, layers[-1], image_size=size)
        branches.append(
            {
                "name": spec.name,
                "depth": depth,
                "layers": list(layers),
                "merge": spec.merge,
                "align": _with_width(spec.align, language_width),
                "image_size": size,
                "mean": checkpoint.mean or mean,
                "std": checkpoint.std or std,
                "final_norm": spec.final_norm,
            }
        )
    return CommVisionConfig(branches=branches, fuse=fuse, reduce=reduce, **configs)


def _with_width(align: str | Mapping[str, Any], language_width: int) -> str | dict[str, Any]:
    """The align, `out: language-model` as the number that it stands for."""
    if isinstance(align, str) or align.get("out") != "language-model":
        return align if isinstance(align, str) else dict(align)
    return {**align, "out": language_width}
