"""Peers' checkpoints on disk -> a checkpoint of ours, with its processor."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data.dialogue import CHAT_TEMPLATE
from ..model import CommForConditionalGeneration, CommProcessor, build_processor
from ..model.build import add_image_token, settle_generation
from ..model.checkpoints import CheckpointError
from ..model.importing import import_llava, import_shikra
from ..model.processing import IMAGE_TOKEN
from ..train.assemble import load_tokenizer
from ..train.whole import save_whole

SHIKRA = ("<im_patch>", "<im_start>", "<im_end>")


def import_checkpoint(kind: str, path: str, out: Path, *, vision: str | None = None) -> CommForConditionalGeneration:
    """Imports a checkpoint of `kind` ("llava", "shikra") into the folder `out`, processor included, and returns the model.

    vision: Shikra's CLIP, where its own name for it does not lead anywhere. Raises ValueError for what cannot be imported and
    for a folder that exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out")
    if kind == "shikra" and not Path(path).is_dir():
        raise CheckpointError(
            f"{path!r} is no folder; Shikra's weights are given out as a delta: name the folder of their sum"
        )
    tokenizer = load_tokenizer(path)
    model = import_llava(path) if kind == "llava" else _shikra(path, tokenizer, vision)
    save_whole(out, model, _processor(model, tokenizer))
    return model


def _shikra(path: str, tokenizer: PreTrainedTokenizerBase, vision: str | None) -> CommForConditionalGeneration:
    vocabulary = tokenizer.get_vocab()
    for token in SHIKRA:
        if token not in vocabulary:
            raise CheckpointError(f"the tokenizer of {path!r} has no {token}; give Shikra's own, with its delta added")
    patch, start, end = (vocabulary[token] for token in SHIKRA)
    return import_shikra(path, vision=vision, image_patch_id=patch, frame_ids=(start, end))


def _processor(model: CommForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> CommProcessor:
    """Our processor, whose image token must be the id that the model writes over."""
    wanted = model.config.image_token_id
    if tokenizer.get_vocab().get(IMAGE_TOKEN) != wanted:
        model.config.image_token_id = add_image_token(tokenizer)
        size = max(len(tokenizer), model.config.image_token_id + 1)
        if size > model.config.text_config.vocab_size:  # type: ignore[union-attr]
            model.resize_token_embeddings(size, mean_resizing=False)
    processor = build_processor(model.config, tokenizer, chat_template=CHAT_TEMPLATE)
    settle_generation(model, tokenizer)  # configs often have the library's ids, not those of their own tokenizer
    return processor
