"""A training step without its numbers: what it holds and computes, counted on tensors that have shapes alone.

The real model runs forward and backward on fake tensors (torch's FakeTensorMode), operation by operation as on a CPU, so
nothing is estimated by formula: live tensors are counted as `memory` counts them in a real run, FLOPs by torch's counter. Any
family of language model or encoder, any merge and any set of trained parts is counted by the same code, without any memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import pytorch_utils

from .attention import NAME as SHARED_PREFIX
from .config import CommConfig
from .flops import flop_counter
from .loss import summed_loss
from .memory import LiveBytes
from .modeling import CommForConditionalGeneration


@dataclass(frozen=True)
class Shape:
    """What one forward pass reads. images: rows, each with one image. prefix: shared tokens of a row, visual ones included.
    branches: lengths of what follows in each row. supervised: positions of all rows that have logits. packed: all rows in
    one, read by shared-prefix attention; otherwise padded rows with a mask. stored: the encoders' features are read, and no
    encoder is run."""

    images: int
    prefix: int
    branches: tuple[int, ...]
    supervised: int
    packed: bool
    stored: bool = False

    @property
    def row(self) -> int:
        """Tokens of one image's row."""
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class Way:
    """How a step is computed. trains: the parts that learn. autocast: weights in fp32, computed in bf16; half: weights in
    bf16. checkpointing: of the language model's blocks. adapt: what is done to the model then, such as
    adapters put in, or None."""

    trains: frozenset[str]
    autocast: bool = False
    half: bool = False
    checkpointing: bool = False
    adapt: Callable[[CommForConditionalGeneration], Any] | None = None


@dataclass(frozen=True)
class Held:
    """Bytes at the moment of a step at which most is held beside weights and optimizer. gradients: those that are kept.
    copies: weights in autocast's dtype. logits: tensors as wide as the vocabulary. activations: everything else."""

    gradients: int
    copies: int
    logits: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.copies + self.logits + self.activations


class Watched(LiveBytes):
    """Live bytes, and at their peak how many are copies of weights and how many are logits."""

    def __init__(self, weights: set[int], vocabulary: int) -> None:
        super().__init__()
        self.weights, self.vocabulary = weights, vocabulary
        self.kinds: dict[int, str] = {}
        self.held = {"copies": 0, "logits": 0, "gradients": 0}
        self.at_peak = dict(self.held)
        self.copying = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copying = func is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self.weights
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _see(self, tensor: Tensor, *, count: bool) -> None:
        key, size = id(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        if count and key not in self._known:
            wide = tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
            kind = "copies" if self.copying else "logits" if wide else None
            if kind is not None:
                self.kinds[key] = kind
                self.held[kind] += size
        before = self.peak
        super()._see(tensor, count=count)
        if self.peak > before:
            self.at_peak = dict(self.held)

    def _gone(self, key: int, size: int) -> None:
        kind = self.kinds.pop(key, None)
        if kind is not None:
            self.held[kind] -= size
        super()._gone(key, size)

    def keep(self, gradient: Tensor) -> None:
        """A gradient that stays until the optimizer has read it."""
        key = id(gradient.untyped_storage())
        if self.kinds.get(key) != "gradients":
            self.kinds[key] = "gradients"
            self.held["gradients"] += gradient.untyped_storage().nbytes()


@contextmanager
def fake_model(config: CommConfig, way: Way) -> Iterator[CommForConditionalGeneration]:
    """The model on fake tensors, inside their mode, in training mode, with nothing but `way.trains` learning."""
    kind = torch.bfloat16 if way.half else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with torch.device("meta"):
            model = CommForConditionalGeneration._from_config(config, dtype=kind)
        for part, module in model.parts().items():
            module.requires_grad_(part in way.trains)
        if way.adapt is not None:
            way.adapt(model)
        if way.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with FakeTensorMode(), _nothing_remembered():
            _to_fake(model)
            yield model.train()


@contextmanager
def _nothing_remembered() -> Iterator[None]:
    """Tensors that the library remembers between calls (DINOv3's places) would leak from here into real runs, or from them.

    Its cache stands aside while torch compiles, and is told so.
    """
    library: Any = pytorch_utils
    asked = library.is_torchdynamo_compiling
    library.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        library.is_torchdynamo_compiling = asked


def _to_fake(model: nn.Module) -> None:
    """Every parameter and buffer as a fake tensor on the CPU; tied ones stay one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = made.get(id(parameter))
                if fake is None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    fake = made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def step_loss(model: CommForConditionalGeneration, shape: Shape, *, autocast: bool) -> Tensor:
    """The loss of one forward pass: what `CommForConditionalGeneration.forward` does, but for its look at the ids' values."""
    config: Any = model.config
    rows = (1, shape.images * shape.row) if shape.packed else (shape.images, shape.row)
    ids = torch.zeros(rows, dtype=torch.long)
    sizes = (config.vision_config.pixels_per_image,)
    if shape.stored:
        sizes = (1, sum(map(math.prod, model.model.vision_tower.stored_shapes())))
    pixels = torch.zeros(shape.images, *sizes, dtype=model.dtype)
    model.model.language_model.set_attn_implementation(SHARED_PREFIX if shape.packed else "sdpa")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        words = model.get_input_embeddings()(ids)
        features: Any = model.get_image_features(pixels, return_dict=True).pooler_output
        slots = (ids == config.image_token_id).unsqueeze(-1)
        embeds = words.masked_scatter(slots, torch.cat(list(features)).to(words.dtype))
        look, pieces = None, None
        if shape.packed:
            look, pieces = model.model._packed([[shape.prefix, *shape.branches]] * shape.images, embeds)
        else:
            look = model.model._additive(torch.ones(shape.images, 1, shape.row, shape.row, dtype=torch.bool), embeds)
        options: Any = {"pieces": pieces, "attention_mask": look, "use_cache": False}
        hidden = model.model.language_model(inputs_embeds=embeds, position_ids=ids, **options).last_hidden_state
        states = hidden.flatten(0, 1)[: shape.supervised]
        targets = torch.zeros(len(states), dtype=torch.long)
        return summed_loss(model.lm_head, states, targets, vocabulary=config.text_config.vocab_size)


def held_bytes(config: CommConfig, way: Way, shape: Shape, *, gradients: str = "made") -> Held:
    """What one forward and backward pass holds at most.

    gradients: "made" by this pass, from nothing; "there" already, from passes before it; or "sharded", given away as soon as
    they are made, where what stays of them is counted elsewhere.
    """
    with fake_model(config, way) as model:
        learning = [p for p in model.parameters() if p.requires_grad]
        kept = sum(p.numel() * p.element_size() for p in learning)
        weights = {id(p.untyped_storage()) for p in model.parameters()}
        with Watched(weights, config.text_config.vocab_size) as count:  # type: ignore[union-attr]

            def done(parameter: Tensor) -> None:
                if gradients == "made":
                    count.keep(parameter.grad)  # type: ignore[arg-type]
                else:
                    parameter.grad = None

            for parameter in learning:
                parameter.register_post_accumulate_grad_hook(done)
            step_loss(model, shape, autocast=way.autocast).backward()
        at = count.at_peak
        rest = count.peak - sum(at.values())
        return Held(kept if gradients == "there" else at["gradients"], at["copies"], at["logits"], rest)


def step_flops(config: CommConfig, way: Way, shape: Shape) -> int:
    """FLOPs of one forward and backward pass, recomputed ones included where there is checkpointing."""
    with fake_model(config, way) as model, flop_counter() as counter:
        step_loss(model, shape, autocast=way.autocast).backward()
        return counter.get_total_flops()
