"""Recipe -> model and processor."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.dialogue import CHAT_TEMPLATE
from ..model.build import build_model, build_processor
from ..model.checkpoints import CheckpointError
from ..model.modeling import CommForConditionalGeneration
from ..model.processing import CommProcessor
from ..model.spec import EncoderSpec
from .keys import nearest_key
from .recipe import Encoder, Model

MICRO = "micro:"


def located(checkpoint: str) -> str:
    """A checkpoint's folder when it is one of the shipped tiny ones ("micro:clip"), its own name otherwise.

    Raises CheckpointError for a tiny one that is not shipped.
    """
    if not checkpoint.startswith(MICRO):
        return checkpoint
    weights = Path(str(resources.files("commvlm") / "microworld" / "weights"))
    name = checkpoint.removeprefix(MICRO)
    shipped = sorted(p.name for p in weights.iterdir() if (p / "config.json").exists()) if weights.is_dir() else []
    if name not in shipped:
        raise CheckpointError(f"no tiny checkpoint {checkpoint!r} is shipped{nearest_key(name, shipped)}")
    return str(weights / name)


def encoder_spec(encoder: Encoder) -> EncoderSpec:
    """The model room's words for a recipe's encoder."""
    return EncoderSpec(**{**dataclasses.asdict(encoder), "checkpoint": located(encoder.checkpoint)})


def model_settings(model: Model) -> dict[str, Any]:
    """A recipe's model as what `model.spec.build_config` and `model.build.build_model` take."""
    return {
        "encoders": [encoder_spec(encoder) for encoder in model.encoders],
        "language_model": located(model.language_model),
        "fuse": model.fuse,
        "reduce": model.reduce,
        "project": model.project,
        "frame": model.frame,
        "pad_color": model.pad_color,
    }


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The language model's tokenizer. Raises CheckpointError where none is to be had."""
    name = located(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0][:160]
        raise CheckpointError(
            f"no tokenizer for language model {checkpoint!r}: {reason}; give a folder that holds one"
        ) from error


def assemble(
    recipe: Model, *, weights: str = "checkpoint", seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[CommForConditionalGeneration, CommProcessor]:
    """The recipe's model and its processor, chat template included; see `model.build.build_model` for `weights`."""
    tokenizer = load_tokenizer(recipe.language_model)
    model = build_model(**model_settings(recipe), weights=weights, tokenizer=tokenizer, seed=seed, dtype=dtype)
    return model, build_processor(model.config, tokenizer, chat_template=CHAT_TEMPLATE)
