"""Recipe -> model and processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.dialogue import CHAT_TEMPLATE
from ..model.build import add_image_token, build_model, build_processor, settle_generation, weights_of
from ..model.checkpoints import CheckpointError
from ..model.config import CommConfig
from ..model.modeling import CommForConditionalGeneration
from ..model.processing import CommProcessor
from ..model.spec import EncoderSpec, build_config
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
    recipe: Model, *, weights: str = "checkpoint", seed: int = 0, dtype: torch.dtype = torch.float32, start: str = ""
) -> tuple[CommForConditionalGeneration, CommProcessor]:
    """The recipe's model and its processor, chat template included; see `model.build.build_model` for `weights`.

    start: a run or a saved model that gives all weights. Raises CheckpointError where it is another model than the recipe's,
    naming every key in which they differ.
    """
    tokenizer = load_tokenizer(recipe.language_model)
    settings = model_settings(recipe)
    if start:
        token = add_image_token(tokenizer)
        model = _started(Path(start), build_config(**settings, image_token_id=token, vocab_size=len(tokenizer)), dtype)
        settle_generation(model, tokenizer)
    else:
        model = build_model(**settings, weights=weights, tokenizer=tokenizer, seed=seed, dtype=dtype)
    return model, build_processor(model.config, tokenizer, chat_template=CHAT_TEMPLATE)


def _started(start: Path, wanted: CommConfig, dtype: torch.dtype) -> CommForConditionalGeneration:
    folder = start if (start / "config.json").is_file() else start / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"train.start {start} is no finished run and no saved model: it has no config.json")
    load: Any = CommForConditionalGeneration.from_pretrained
    try:
        with weights_of(str(folder)):
            config = CommConfig.from_pretrained(folder, local_files_only=True)
            odd = list(_odd(config.to_dict(), wanted.to_dict()))
            if odd:
                more = f"; and {len(odd) - 6} more" if len(odd) > 6 else ""
                raise CheckpointError(f"train.start {start} is another model ({'; '.join(odd[:6])}{more})")
            model, report = load(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"train.start {start} cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    if report["missing_keys"]:
        raise CheckpointError(f"train.start {start} lacks weights (first: {sorted(report['missing_keys'])[0]})")
    return model.eval()


BOOKKEEPING = ("transformers_version", "dtype", "architectures", "_name_or_path", "lm_head_bias", "use_cache")
"""Keys of a config that say nothing about which weights a model has."""


def _odd(there: Any, here: Any, key: str = "") -> Iterator[str]:
    """What differs between two configs as dicts, key by key."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*there, *here]):
            if name not in BOOKKEEPING:
                yield from _odd(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from _odd(a, b, f"{key}[{number}]")
    elif there != here:
        yield f"{key}: {there!r} there, {here!r} in the recipe"
