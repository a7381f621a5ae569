"""Answering with a checkpoint: a trained model as what `evaluate` calls an answerer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.collate import Collator
from ..data.example import Example
from ..data.geometry import GEOMETRIES, View
from ..data.images import OPENERS
from ..model import CommForConditionalGeneration
from .checkpoint import device_named, load_checkpoint, placed, resolve_checkpoint, round_linears
from .decoding import Decoder, Prompt, Row

__all__ = ["Answerer", "load_checkpoint", "resolve_checkpoint"]

PRECISIONS = ("fp32", "bf16")
REMEMBERED = 512 * 2**20
"""Bytes of visual tokens that are kept, so that an image is not read again for the next batch or task."""


class Answerer:
    """Instructed examples -> the answer to each one's last turn, greedily decoded.

    images: "given", "grey" for the blind control, or "shuffled", which sees another image (`data.images.OPENERS`). precision:
    "fp32" (as the weights are) or "bf16" (autocast). device: the GPU by default where there is one. batch_size: questions
    that are answered at once; an image is read once for all of them, and remembered for the next ones. knock_out: what is
    switched off, such as "dinov2" or "clip:1-8" (see `CommVisionModel.forward`). bits: see `load_checkpoint`.
    longest: tokens of a prompt and its answer; None for a language model that states no length.
    """

    def __init__(
        self, checkpoint: Path | str, *, max_new_tokens: int = 64, batch_size: int = 32, images: str = "given",
        precision: str = "fp32", device: str | None = None, knock_out: str = "", bits: int | None = None,
    ) -> None:  # fmt: skip
        for value, valid, what in ((images, OPENERS, "images"), (precision, PRECISIONS, "precision")):
            if value not in valid:
                raise ValueError(f"{what} is {value!r}; valid: {', '.join(valid)}")
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens and batch_size must be positive, got {max_new_tokens} and {batch_size}")
        self.device = device_named(device)
        model, self.processor = load_checkpoint(checkpoint, bits=bits, device=str(self.device))
        if precision == "bf16":
            round_linears(model)
        self.model: CommForConditionalGeneration = model if bits else placed(model, self.device)
        self.batch_size, self.images, self.precision, self.knock_out = batch_size, images, precision, knock_out
        self.model.model.vision_tower.off(knock_out)  # a slip is told before anything is asked
        stated = self.model.config.text_config.to_dict().get("max_position_embeddings")  # type: ignore[union-attr]
        self.longest = None if stated is None else int(stated)
        shown = self.processor.image_processor
        self.collator = Collator(
            self.processor.tokenizer,
            shown,
            self.model.config.num_image_tokens,
            max_length=None if self.longest is None else max(1, self.longest - max_new_tokens),
            geometry=shown.geometry,
            pixels=images,
        )
        pad: Any = self.processor.tokenizer.pad_token_id
        self.decoder = Decoder(self.model, max_new_tokens=max_new_tokens, pad=0 if pad is None else int(pad))
        self._remembered: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        """Texts in the examples' order. Raises ValueError with the example's id for what cannot be asked."""
        # Questions about one image side by side, short ones first: its prefix is read once, and padding is small.
        order = sorted(
            range(len(examples)), key=lambda k: (str(examples[k].image or ""), len(examples[k].turns[-1].question))
        )
        texts = [""] * len(examples)
        for _, kind in groupby(order, key=lambda k: examples[k].image is None):
            places = list(kind)
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                for place, text in zip(batch, self._answer([examples[k] for k in batch]), strict=True):
                    texts[place] = text
        return texts

    def forget(self) -> None:
        """Reads every image anew from here on."""
        self._remembered.clear()

    def autocast(self) -> AbstractContextManager[Any]:
        """What the model is asked in, by its precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def view(self, width: int, height: int) -> View:
        """What is shown of an image of that size, in which the boxes of a text are to be read."""
        return GEOMETRIES[self.collator.geometry](width, height)

    def stream(self, example: Example, *, knock_out: str | None = None) -> Iterator[str]:
        """The answer to one example as it grows: all of it so far, each time that it has become longer; the last one is what
        `__call__` gives. knock_out: what is switched off for this one, in place of the answerer's own."""
        with self.autocast():  # never held while somebody else's code runs, maybe in another thread
            (prompt,) = self._prompts([example], self.knock_out if knock_out is None else knock_out)
            row, growing, shown = Row(prompt, self.decoder.max_new_tokens), self.decoder.start(), None
            self.decoder.begin(growing, [row])
        while True:
            (text,) = self._texts([row.said])
            if growing.rows:  # half a character reads as U+FFFD until its other bytes have come
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            if text != shown:
                yield text
            if not growing.rows:
                return
            shown = text
            with self.autocast():
                growing.step()

    @torch.inference_mode()
    def visual_tokens(
        self, images: Iterable[Hashable], pixels: Callable[[list[Hashable]], Tensor], *, knock_out: str | None = None
    ) -> dict[Hashable, Tensor]:
        """(N, hidden) of every image: read together, those apart that were read before. pixels: (images, P) of some.
        knock_out: in place of the answerer's own."""
        off = self.knock_out if knock_out is None else knock_out
        images, known = list(dict.fromkeys(images)), self._remembered
        found = {image: known[image, off] for image in images if (image, off) in known}
        new = [image for image in images if image not in found]
        if new:
            read: Any = self.model.get_image_features(pixels(new).to(self.device), knock_out=off, return_dict=True)
            found |= dict(zip(new, read.pooler_output, strict=True))
        for image in images:
            known[image, off] = found[image]
            known.move_to_end((image, off))
        while sum(tokens.nbytes for tokens in known.values()) > REMEMBERED:
            known.popitem(last=False)
        return found

    def _answer(self, examples: Sequence[Example]) -> list[str]:
        with self.autocast():
            return self._texts(self.decoder(self._prompts(examples, self.knock_out)))

    def _texts(self, said: Sequence[Sequence[int]]) -> list[str]:
        return [text.strip() for text in self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)]

    def _prompts(self, examples: Sequence[Example], knock_out: str) -> list[Prompt]:
        images = self.collator.opened(examples)
        rows = self.collator.prompts(examples, images)

        states = {path: _state(path) for path in images}

        def pixels(new: list[Any]) -> Tensor:
            shown = [images[path] for path, *_ in new]
            return self.collator.image_processor(images=shown, return_tensors="pt")["pixel_values"]

        tokens = self.visual_tokens(states.values(), pixels, knock_out=knock_out)
        return [
            Prompt(
                torch.from_numpy(row), example.image, None if example.image is None else tokens[states[example.image]]
            )
            for row, example in zip(rows, examples, strict=True)
        ]


def _state(path: Path) -> tuple[Path, int, int]:
    """What an image is remembered by: another one may be written under its name."""
    found = path.stat()
    return path, found.st_mtime_ns, found.st_size
