"""Answering with a checkpoint: a trained model as what `evaluate` calls an answerer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from ..data.collate import Batch, Collator
from ..data.example import Example
from ..data.images import GreyImages
from ..model import CommForConditionalGeneration, CommProcessor

IMAGES = ("given", "grey")
PRECISIONS = ("fp32", "bf16")


def resolve_checkpoint(path: Path | str) -> Path:
    """The model's folder: `path` itself, or what the run.json of a run (or of a demo) in `path` names.

    Raises ValueError for anything else, with the next step.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no checkpoint: there is no such folder; give a folder made by `commvlm train`")
    if (path / "config.json").is_file():
        kind = _read_object(path / "config.json").get("model_type")
        if kind != "comm":
            raise ValueError(
                f"{path} is no COMM checkpoint: its config.json says model_type {kind!r}, not 'comm'; "
                "give a folder made by `commvlm train`"
            )
        return path
    if (path / "run.json").is_file():
        named = _read_object(path / "run.json").get("model")
        if (
            not isinstance(named, str)
            or Path(named).is_absolute()
            or ".." in Path(named).parts
            or Path(named) == Path()
        ):
            raise ValueError(f"{path / 'run.json'} names the model {named!r}, which is no folder inside {path}")
        return resolve_checkpoint(path / named)
    if (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} is an unfinished run; the same `commvlm train` command goes on with it")
    raise ValueError(
        f"{path} is no checkpoint: no config.json and no run.json in it; give a folder made by `commvlm train`"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({_line(error)}); make the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; make the checkpoint again")
    return content


def load_checkpoint(path: Path | str) -> tuple[CommForConditionalGeneration, CommProcessor]:
    """Model (in eval mode, in the dtype it was saved in) and processor. Reads safetensors only and runs no code of the
    folder. Raises ValueError for a folder that is no checkpoint, or whose weights are broken or not all there."""
    folder = resolve_checkpoint(path)
    load: Any = CommForConditionalGeneration.from_pretrained
    try:
        with _quietly():
            model, report = load(folder, use_safetensors=True, local_files_only=True, output_loading_info=True)
            processor = CommProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"checkpoint {folder} cannot be loaded ({_line(error)}); copy or train it again") from error
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"checkpoint {folder} lacks {len(lacking)} weights (first: {lacking[0]}): its config.json and its weights "
            "do not belong together; copy or train it again"
        )
    return model.eval(), processor


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's bars and warnings: what it would warn about on loading is an error here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class Answerer:
    """Instructed examples -> the answer to each one's last turn, greedily decoded.

    images: "given", or "grey" for the blind control, which sees every image as a uniform grey of its size. precision:
    "fp32" (as the weights are) or "bf16" (autocast). device: the GPU by default where there is one.
    """

    def __init__(
        self, checkpoint: Path | str, *, max_new_tokens: int = 64, batch_size: int = 32, images: str = "given",
        precision: str = "fp32", device: str | None = None,
    ) -> None:  # fmt: skip
        for value, valid, what in ((images, IMAGES, "images"), (precision, PRECISIONS, "precision")):
            if value not in valid:
                raise ValueError(f"{what} is {value!r}; valid: {', '.join(valid)}")
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens and batch_size must be positive, got {max_new_tokens} and {batch_size}")
        model, self.processor = load_checkpoint(checkpoint)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model: CommForConditionalGeneration = model.to(self.device)  # type: ignore[arg-type]
        self.max_new_tokens, self.batch_size, self.precision = max_new_tokens, batch_size, precision
        shown = self.processor.image_processor
        self.collator = Collator(
            self.processor.tokenizer,
            GreyImages(shown) if images == "grey" else shown,
            self.model.config.num_image_tokens,
            max_length=_room(self.model, max_new_tokens),
        )

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        """Texts in the examples' order. Raises ValueError with the example's id for what cannot be asked."""
        # Questions about one image side by side, short ones first: its prefix is read once, and padding is small.
        order = sorted(
            range(len(examples)), key=lambda k: (str(examples[k].image), len(examples[k].turns[-1].question))
        )
        texts = [""] * len(examples)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            for place, text in zip(places, self._answer([examples[k] for k in places]), strict=True):
                texts[place] = text
        return texts

    @torch.inference_mode()
    def _answer(self, examples: Sequence[Example]) -> list[str]:
        batch: Batch = {name: tensor.to(self.device) for name, tensor in self.collator.prompt_batch(examples).items()}
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with autocast:
            batch = self._with_prefix_read(batch, examples)
            generate: Any = self.model.generate  # pyright: ignore[reportAttributeAccessIssue]
            ids = generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        said = ids[:, batch["input_ids"].shape[1] :]  # type: ignore[index,call-overload]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def _with_prefix_read(self, batch: Batch, examples: Sequence[Example]) -> Batch:
        """The batch with the keys and values of everything up to the image's end, computed once per distinct image.

        Prompts about one image begin alike, and most of their length is the image. Left as it is when the prompts do
        not begin with the same ids, or when no two share an image.
        """
        first = {example.image: k for k, example in reversed(list(enumerate(examples)))}
        if None in first or len(first) == len(examples):
            return batch
        mask, image_id = batch["attention_mask"], self.model.config.image_token_id
        rows = [ids[kept.bool()] for ids, kept in zip(batch["input_ids"], mask, strict=True)]
        length = int((rows[0] == image_id).nonzero().max()) + 1
        prefix = rows[0][:length]
        if any(len(row) <= length or not torch.equal(row[:length], prefix) for row in rows):
            return batch
        images = {image: number for number, image in enumerate(first)}
        read = self.model.model(
            input_ids=prefix.expand(len(images), -1), pixel_values=batch["pixel_values"][list(first.values())],
            use_cache=True,
        )  # fmt: skip
        cache: Any = read.past_key_values
        cache.batch_select_indices(torch.tensor([images[example.image] for example in examples], device=self.device))
        return _rest(rows, prefix, pad=self.processor.tokenizer.pad_token_id) | {"past_key_values": cache}


def _rest(rows: Sequence[Tensor], prefix: Tensor, *, pad: Any) -> Batch:
    """Rows that begin with `prefix`, what comes after it padded on the left: input_ids, attention_mask (b, n)."""
    length, longest = len(prefix), max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), int(pad), dtype=prefix.dtype, device=prefix.device)
    mask = torch.zeros_like(ids)
    ids[:, :length], mask[:, :length] = prefix, 1
    for place, row in enumerate(rows):
        start = longest - (len(row) - length)
        ids[place, start:], mask[place, start:] = row[length:], 1
    return {"input_ids": ids, "attention_mask": mask}


def _room(model: CommForConditionalGeneration, max_new_tokens: int) -> int | None:
    """The longest prompt that leaves room for the answer; None for a language model that states no length."""
    stated = model.config.text_config.to_dict().get("max_position_embeddings")  # type: ignore[union-attr]
    return None if stated is None else max(1, int(stated) - max_new_tokens)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")[:200]
