"""A COMM checkpoint as a chat model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/api/model.py).

Its requests become Examples, so that questions about one image share its prefix there too. Its own prompts are asked as they
are; its referring tasks read boxes as shares of width and height without padding, which is not how COMM writes them.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from ..data.example import IMAGE, Example, Turn
from .answering import Answerer

DEFAULT_TOKENS = 64


class CommVLM(lmms):
    """pretrained: a run's folder or a saved model's. batch_size: questions answered at once.

    Under `accelerate launch` or torchrun each process answers its share on its own device; lmms-eval deals the questions and
    gathers the scores by `rank`, `world_size`, `device` and `accelerator`, so these are what it is told here.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = 16, device: str | None = None, precision: str = "fp32",
        max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size is {batch_size!r}; give a number, such as batch_size=16")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.answer = Answerer(pretrained, batch_size=int(batch_size), device=device, precision=precision)
        self.device = self.answer.device
        self._folder = tempfile.TemporaryDirectory(prefix="commvlm-lmms-")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers in the requests' order, each cut at its first stop text."""
        asked = [self._asked(number, request) for number, request in enumerate(requests)]
        texts: dict[int, str] = {}
        for tokens in sorted({_tokens(options) for _, options in asked}):
            places = [k for k, (_, options) in enumerate(asked) if _tokens(options) == tokens]
            self.answer.decoder.max_new_tokens = tokens
            texts |= dict(zip(places, self.answer([asked[k][0] for k in places]), strict=True))
        return [_cut(texts[k], options) for k, (_, options) in enumerate(asked)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("commvlm answers by generating; choose a task of output type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("commvlm answers one round at a time; choose a task of output type generate_until")

    def _asked(self, number: int, request: Any) -> tuple[Example, Mapping[str, Any]]:
        """Arguments of a chat request: context, document -> messages, options, document's place, task, split."""
        _, to_messages, options, document, task, split = request.args
        messages = to_messages(self.task_dict[task][split][document])
        return self._example(f"{task}:{document}:{number}", messages), options

    def _example(self, id: str, messages: Sequence[Mapping[str, Any]]) -> Example:
        """What a system message says goes before the first question. Raises ValueError for more than one image, for anything
        but pictures and text, and for turns that are not the user's and the assistant's in turn, from and to the user."""
        roles = [message["role"] for message in messages]
        system = roles[:1] == ["system"]
        if roles[system:] != ["user", "assistant"] * (len(roles[system:]) // 2) + ["user"]:
            raise ValueError(f"request {id} has the turns {', '.join(roles)}; commvlm reads user, assistant, ..., user")
        images: list[Path] = []
        texts: list[str] = []
        for message in messages:
            said = []
            for part in message["content"]:
                if part["type"] == "text":
                    said.append(part["text"])
                elif part["type"] == "image":
                    images.append(self._saved(part["url"]))
                else:
                    raise ValueError(f"request {id} holds a {part['type']}; commvlm reads one image and text")
            texts.append(" ".join(said).strip())
        if len(images) > 1:
            raise ValueError(f"request {id} shows {len(images)} images; commvlm reads one")
        if system:
            texts = ["\n".join(filter(None, texts[:2])), *texts[2:]]
        if images:
            texts[0] = f"{IMAGE}\n{texts[0]}"
        turns = [Turn(*pair) for pair in zip(texts[::2], [*texts[1::2], ""], strict=False)]
        return Example(id, "dialogue", images[0] if images else None, tuple(turns))

    def _saved(self, image: Image.Image | str) -> Path:
        """The picture as a file named by its pixels: the same picture is the same file, and is read once. What is transparent
        stays so, and becomes white where the file is opened, as in training."""
        if isinstance(image, str):
            return Path(image)
        shown = image.convert("RGBA" if image.has_transparency_data else "RGB")
        digest = hashlib.sha256(f"{shown.mode} {shown.size}".encode() + shown.tobytes()).hexdigest()
        path = Path(self._folder.name) / f"{digest}.png"
        if not path.exists():
            shown.save(path)
        return path


def _tokens(options: Mapping[str, Any]) -> int:
    """How long an answer may be. Raises ValueError for sampling, which is not greedy."""
    if options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
        raise ValueError("commvlm answers greedily: set temperature 0, num_beams 1 and do_sample false in the task")
    return int(options.get("max_new_tokens") or DEFAULT_TOKENS)


def _cut(text: str, options: Mapping[str, Any]) -> str:
    until = options.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text.strip()
