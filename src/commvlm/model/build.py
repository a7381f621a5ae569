"""Assemble a model from named checkpoints: encoders, language model, and fresh merges, alignments and projection."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .checkpoints import CheckpointError
from .config import CommConfig
from .encoders import load_encoder, new_encoder
from .modeling import CommForConditionalGeneration
from .names import choice
from .processing import IMAGE_TOKEN, CommImageProcessor, CommProcessor
from .spec import WEIGHTS, EncoderSpec, build_config
from .vision import initialise


def build_model(
    encoders: Sequence[EncoderSpec],
    *,
    language_model: str,
    fuse: str | Mapping[str, Any] = "channel-concat",
    reduce: str | Mapping[str, Any] = "none",
    project: str | Mapping[str, Any] = "linear",
    frame: str = "none",
    pad_color: Sequence[int] = (255, 255, 255),
    weights: str = "checkpoint",
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CommForConditionalGeneration:
    """A model of the given parts, in eval mode.

    weights: "random" needs the checkpoints' configs only (an encoder's own "random" holds either way). tokenizer: the
    language model's; the image token is added to it when it lacks one, and the vocabulary follows; None appends one
    token. device: "meta" gives shapes without memory. seed: of every random weight, per
    part, so that a change of one part leaves the others as they were; the caller's generator is left alone.
    Raises CheckpointError, ValueError for parts that are not there or do not fit.
    """
    choice(weights, of=WEIGHTS, what="weights")
    token = None if tokenizer is None else add_image_token(tokenizer)
    size = None if tokenizer is None else len(tokenizer)
    config = build_config(
        encoders, language_model=language_model, fuse=fuse, reduce=reduce, project=project, frame=frame, pad_color=pad_color,
        image_token_id=token, vocab_size=size,
    )  # fmt: skip
    if device == "meta":
        model = _skeleton(config, dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            parts = _make_parts(config, encoders, language_model, random=weights == "random", dtype=dtype, seed=seed)
            model = assemble_parts(config, *parts, dtype=dtype, seed=seed).to(device)  # pyright: ignore[reportArgumentType]
    settle_generation(model, tokenizer)
    return model.eval()


def _skeleton(config: CommConfig, dtype: torch.dtype) -> CommForConditionalGeneration:
    with torch.device("meta"):
        return CommForConditionalGeneration._from_config(config, dtype=dtype)


def _make_parts(
    config: CommConfig,
    encoders: Sequence[EncoderSpec],
    language_model: str,
    *,
    random: bool,
    dtype: torch.dtype,
    seed: int,
) -> tuple[dict[str, PreTrainedModel], Any, Any]:
    """The encoders by name, the language model's body, and its head: loaded, or with random weights."""
    vision: Any = config.vision_config
    loaded = {
        spec.name: make_encoder(spec, vision.encoder_config(spec.name), random=random, dtype=dtype, seed=seed)
        for spec in encoders
    }
    _seed(seed, "language model")
    text = _language_model(config, language_model, random=random, dtype=dtype)
    return loaded, text.base_model, text.get_output_embeddings()


def make_encoder(
    spec: EncoderSpec,
    config: PreTrainedConfig,
    *,
    random: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """One frozen encoder, as deep as `config` says: its checkpoint's weights, or random ones of its own seed."""
    _seed(seed, "encoder", spec.name)
    if random or spec.weights == "random":
        return new_encoder(config, dtype=dtype)
    with weights_of(spec.checkpoint):
        return load_encoder(spec.checkpoint, config, dtype=dtype)


def assemble_parts(
    config: CommConfig,
    encoders: Mapping[str, PreTrainedModel],
    body: PreTrainedModel,
    head: nn.Linear,
    *,
    dtype: torch.dtype,
    seed: int = 0,
) -> CommForConditionalGeneration:
    """Put encoders (by name), a language model's body and its head into a model without memory of its own, so that none is
    held twice; make what is between them. seed: of every weight made here."""
    for name, encoder in encoders.items():
        setattr(config.vision_config, name, encoder.config)
    config.text_config = body.config
    config.lm_head_bias = head.bias is not None
    model = _skeleton(config, dtype)
    vision = model.model.vision_tower
    for name, encoder in encoders.items():
        vision.add_module(f"enc_{name}", encoder)
        _seed(seed, "branch", name)
        vision.branches[name].to_empty(device="cpu").apply(initialise)
    _seed(seed, "fuse")
    vision.fuse.to_empty(device="cpu").apply(initialise)
    model.model.language_model = body
    model.lm_head = head
    _seed(seed, "project")
    model.model.multi_modal_projector.to_empty(device="cpu").apply(initialise)
    if config.frame == "learned":
        frame: Any = model.model.image_frame.to_empty(device="cpu")
        frame.weight.data.copy_(body.get_input_embeddings().weight.data.mean(0))  # type: ignore[union-attr]
    model.tie_weights()
    return model


def _seed(seed: int, *part: str) -> None:
    """A generator state of its own for each part."""
    torch.manual_seed(zlib.crc32("/".join(part).encode()) * 2**20 + seed)


def _language_model(config: CommConfig, name: str, *, random: bool, dtype: torch.dtype) -> PreTrainedModel:
    text: Any = config.text_config
    if random:
        return AutoModelForCausalLM.from_config(text, dtype=dtype)
    load: Any = AutoModelForCausalLM.from_pretrained
    with weights_of(name):
        model, report = load(
            name, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise CheckpointError(
            f"language model {name!r} lacks {len(lacking)} weights (first: {lacking[0]}); "
            "check that its config.json belongs to its weights"
        )
    if text.vocab_size != model.config.vocab_size:
        model.resize_token_embeddings(text.vocab_size, mean_resizing=False)
    return model


@contextmanager
def weights_of(name: str) -> Iterator[None]:
    """Quietly (blocks left out on purpose are no news), and a failure of the library as one line with the next step."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200]
        raise CheckpointError(
            f"the weights of {name!r} cannot be had ({reason}); give a folder with safetensors weights, "
            "connect to the hub, or build with --weights random"
        ) from error
    finally:
        logging.set_verbosity(level)


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the image token, which is added to the tokenizer when it has none."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))  # type: ignore[arg-type]


def settle_generation(model: CommForConditionalGeneration, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Greedy by default, ends at the end token, never says the placeholder."""
    text: Any = model.config.text_config
    generation = model.generation_config
    source = text if tokenizer is None else tokenizer
    generation.eos_token_id = source.eos_token_id
    generation.bos_token_id = source.bos_token_id
    generation.pad_token_id = source.pad_token_id if source.pad_token_id is not None else source.eos_token_id
    generation.suppress_tokens = [model.config.image_token_id]


def build_processor(
    config: CommConfig, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None
) -> CommProcessor:
    """The processor that fits a model's config. The tokenizer gets the image token, left padding, and a pad token."""
    add_image_token(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    encoders = [
        {"name": branch["name"], "size": branch["image_size"], "mean": branch["mean"], "std": branch["std"]}
        for branch in config.vision_config.branches  # type: ignore[union-attr]
    ]
    images = CommImageProcessor(encoders, geometry=config.geometry, pad_color=config.pad_color)
    return CommProcessor(images, tokenizer, chat_template=chat_template, num_image_tokens=config.num_image_tokens)
