"""Any image-text-to-text model of the library as an answerer: LLaVA, Qwen2-VL, InternVL, PaliGemma, ...

It is asked through its own processor and chat template, in left-padded batches, greedily. Boxes in questions and answers are
written as the model knows them: codec and geometry name a row of `data.boxes.CODECS` and of `data.geometry.GEOMETRIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from ..data.boxes import SHIKRA3, codec_of
from ..data.dialogue import filled_turns
from ..data.example import IMAGE, Example
from ..data.geometry import GEOMETRIES
from ..data.images import open_image
from .checkpoint import device_named, one_line, placed, quietly, round_linears
from .decoding import PLAIN


def load_library_model(path: Path | str) -> tuple[Any, Any]:
    """Model (in eval mode) and processor of a folder, or of a hub name where the hub can be reached.

    Safetensors only, and no code of the folder is run. Raises ValueError for what cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        with quietly():
            processor = AutoProcessor.from_pretrained(path)
            model = AutoModelForImageTextToText.from_pretrained(path, use_safetensors=True, dtype="auto")
    except (OSError, ImportError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be loaded as an image-text-to-text model ({one_line(error)})") from error
    return model.eval(), processor


PENALTIES = (
    "repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "min_length",
    "min_new_tokens", "exponential_decay_length_penalty", "sequence_bias", "watermarking_config",
)  # fmt: skip
"""Of `decoding.PLAIN`, what bends greedy answers; the others, such as forced first tokens, belong to how a model works."""


class LibraryAnswerer:
    """Instructed examples -> the answer to each one's last turn, greedily: `PENALTIES` that a checkpoint brings are lifted.
    See `load_library_model` for model and processor."""

    def __init__(
        self, model: Any, processor: Any, *, max_new_tokens: int = 64, batch_size: int = 16, precision: str = "fp32",
        device: str | None = None, codec: str = SHIKRA3.name, geometry: str = "pad-square",
    ) -> None:  # fmt: skip
        if geometry not in GEOMETRIES:
            raise ValueError(f"there is no geometry {geometry!r}; geometries: {', '.join(GEOMETRIES)}")
        self.device = device_named(device)
        if precision == "bf16":
            round_linears(model)
        self.model, self.processor = placed(model, self.device), processor
        self.max_new_tokens, self.batch_size, self.precision = max_new_tokens, batch_size, precision
        self.codec, self.geometry = codec_of(codec), geometry
        for name in PENALTIES:
            if getattr(model.generation_config, name, None) not in PLAIN[name]:
                setattr(model.generation_config, name, PLAIN[name][-1])
        # Answers grow at the right end of every row, so padding must stand on the left.
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        """Texts in the examples' order. Raises ValueError with the example's id for what cannot be asked."""
        order = sorted(range(len(examples)), key=lambda k: (examples[k].image is None, _length(examples[k])))
        texts = [""] * len(examples)
        while order:
            # Rows with and without an image do not go through one processor call.
            blind = examples[order[0]].image is None
            places = [k for k in order[: self.batch_size] if (examples[k].image is None) == blind]
            order = order[len(places) :]
            for place, text in zip(places, self._answer([examples[k] for k in places]), strict=True):
                texts[place] = text
        return texts

    @torch.inference_mode()
    def _answer(self, examples: Sequence[Example]) -> list[str]:
        opened = {path: open_image(path) for path in dict.fromkeys(e.image for e in examples if e.image is not None)}
        images = [[opened[e.image]] for e in examples if e.image is not None]
        texts = [self.prompt(e, None if e.image is None else opened[e.image]) for e in examples]
        given: dict[str, Any] = {"images": images} if images else {}
        bos = self.processor.tokenizer.bos_token
        if bos and all(
            text.startswith(bos) for text in texts
        ):  # the template's own; the tokenizer would put a second one
            given["add_special_tokens"] = False
        batch = self.processor(text=texts, padding=True, return_tensors="pt", **given).to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with autocast:
            ids = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        asked = batch["input_ids"]  # a model that is given embeddings only may return the answers alone
        width = asked.shape[1]
        said = ids[:, width:] if torch.equal(ids[:, :width], asked) else ids
        return [text.strip() for text in self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def prompt(self, example: Example, image: Image.Image | None) -> str:
        """The dialogue up to its last answer, as the model's chat template has it (Vicuna's form where it has none)."""
        view = None if image is None else GEOMETRIES[self.geometry](*image.size)
        turns = filled_turns(example, view, self.codec)
        messages: list[dict[str, Any]] = []
        for question, answer in turns:
            words = question.replace(f"{IMAGE}\n", "").replace(IMAGE, "")
            shown = [{"type": "image"}] if IMAGE in question else []
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": words}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if template := self.processor.chat_template or self.processor.tokenizer.chat_template:
            return self.processor.apply_chat_template(messages[:-1], chat_template=template, add_generation_prompt=True)
        token = self.processor.image_token
        asked = [f"USER: {q.replace(IMAGE, token)} ASSISTANT: {a}" for q, a in turns]
        return " ".join(asked).removesuffix(f" {turns[-1][1]}")


def _length(example: Example) -> int:
    return sum(len(turn.question) for turn in example.turns)
