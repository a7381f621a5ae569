"""What a recipe's training costs before it starts: memory of one process part by part, and hours of each stage.

Activations, gradients at their peak and FLOPs are counted (`model.dry`) from the recipe's own model and settings; weights and
optimizer states follow from the number of parameters and the engine. What is assumed is in ASSUMED, and printed.
Time is counted FLOPs over peak speed times an efficiency; links between GPUs and data loading are not modelled. What
answering costs is in `answer_planning`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..model.attention import packs
from ..model.config import CommConfig
from ..model.dry import Held, Shape, Way, fake_model, held_bytes, step_flops
from ..model.names import lookup
from ..model.spec import build_config
from ..train.adapters import Adapters
from ..train.assemble import model_settings
from ..train.muon import AT_ONCE, COPIES
from ..train.optimizers import is_hidden, words_of
from ..train.parts import settle_parts
from ..train.recipe import Lora, Recipe, Stage, Train
from ..train.stage import shared_out
from .gpus import GPUS, Gpu

EFFICIENCY = 0.4
"""Share of a GPU's peak that a step reaches, where none is given."""
CONTEXT = 1.0e9
"""Bytes of a GPU that CUDA's context and libraries take."""
LINKS = 0.8e9
"""Bytes that NCCL's buffers take where there are several GPUs."""
FRAGMENTS = 0.05
"""Share of gradients, activations and logits that the allocator holds beside them."""
ASSUMED = (
    "assumed: {efficiency:.0%} of {peak:.0f} bf16 TFLOPs a GPU; {text} tokens of text before the questions, {words} a "
    "question with its answer, {answer} of them supervised; 1.0 GB for CUDA's context, 0.8 GB for NCCL, 5 % for fragments; "
    "links and data loading are not modelled"
)
PAPER = {"comm-7b": {"stage1": 100.0, "stage2": 20.0}}
"""Hours on 8 A800 that the paper states (arXiv 2310.08825, section 4)."""


@dataclass(frozen=True)
class Text:
    """Tokens besides an image's. front: text before a row's questions. words: of a question with its answer. answer: of
    these, the supervised ones."""

    front: int = 40
    words: int = 60
    answer: int = 20


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the moment when it holds most. gathered: weights and gradients of FSDP's or ZeRO-3's units that
    are whole for the moment, or DDP's buckets. copies: weights in bf16 beside those in fp32."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    logits: int
    gathered: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class StagePlan:
    """One stage's cost. micro, accumulated: images at once in a process, and how often for one update. flops: of an update,
    all processes together, recomputed ones included. hours: of the whole stage."""

    stage: Stage
    memory: Memory
    micro: int
    accumulated: int
    flops: int
    hours: float


@dataclass(frozen=True)
class Machine:
    """memory: bytes of one process' device. peak: FLOPs a second of one. cuda: whether CUDA's costs are counted. bandwidth:
    bytes that one reads a second from its memory."""

    name: str
    count: int
    memory: float
    peak: float
    efficiency: float
    cuda: bool
    bandwidth: float = math.inf


def machine(name: str, count: int, efficiency: float | None = None) -> Machine:
    """A machine by its GPU's name in the table; "cpu" is this one, its speed measured. Raises ValueError for another name."""
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(
            name, count, memory, measured_peak(), EFFICIENCY if efficiency is None else efficiency, cuda=False
        )
    gpu: Gpu = lookup(GPUS, name, what="GPU")
    share = EFFICIENCY if efficiency is None else efficiency
    return Machine(name, count, gpu.memory, gpu.peak, share, cuda=True, bandwidth=gpu.bandwidth)


def measured_peak(side: int = 1024, runs: int = 5) -> float:
    """FLOPs a second of fp32 matrix products here, the best of some."""
    a = torch.randn(side, side)
    taken = []
    for _ in range(runs):
        begin = time.perf_counter()
        torch.mm(a, a)
        taken.append(time.perf_counter() - begin)
    return 2 * side**3 / min(taken)


class Planner:
    """Plans of one recipe on one machine. Counts are kept, so that what-ifs are cheap."""

    def __init__(self, recipe: Recipe, on: Machine, text: Text = Text()) -> None:
        self.recipe, self.on, self.text = recipe, on, text
        self.config: CommConfig = build_config(**model_settings(recipe.model))
        self.held = functools.cache(self._held)
        self.flops = functools.cache(self._flops)
        self.sizes = functools.cache(self._sizes)

    def parameters(self) -> int:
        """Of the whole model."""
        return self.sizes(self._way(self.recipe.train.stages[0], self.recipe.train)).total

    def plan(self, stage: Stage, train: Train | None = None) -> StagePlan:
        """What a stage costs, with the recipe's settings or others."""
        train = self.recipe.train if train is None else train
        micro, accumulated = shared_out(stage, self.on.count)
        memory = self.need(stage, train)
        flops = self.flops(self._way(stage, train), micro, packs(train.attention)) * accumulated * self.on.count
        speed = self.on.count * self.on.peak * self.on.efficiency
        return StagePlan(stage, memory, micro, accumulated, flops, flops * stage.steps / speed / 3600)

    def need(self, stage: Stage, train: Train) -> Memory:
        """Memory at the backward pass or at the optimizer's step, whichever holds more."""
        micro, accumulated = shared_out(stage, self.on.count)
        way = self._way(stage, train)
        sizes = self.sizes(way)
        sharded, count = train.engine != "ddp", self.on.count
        whole = 1 if not sharded else count
        # DeepSpeed holds weights and gradients in bf16, and fp32 masters with the optimizer.
        zero = train.engine.startswith("zero")
        each = 2 if zero and train.precision == "bf16" else 4
        weights = sizes.weights_bytes(each, stage.lora) // (1 if train.engine in ("ddp", "zero2") else count)
        gradients = sizes.trained * each // whole
        optimizer = sizes.trained * (12 if each == 2 else 8) // whole
        step = sizes.trained * 4 // whole if self.on.cuda else 2 * 4 * sizes.largest
        if train.optimizer == "muon":  # on whole matrices, in fp32
            optimizer -= 4 * sizes.hidden
            step = max(4 * (sizes.trained - sizes.hidden) if self.on.cuda else step, 4 * COPIES * sizes.stack)
        kept = "sharded" if sharded else "made" if accumulated == 1 else "there"
        held: Held = self.held(way, micro, packs(train.attention), kept)
        backward = held.total + (gradients if sharded else 0)
        gathered = self._gathered(sizes, train)
        overhead = 0
        if self.on.cuda:
            overhead = int(CONTEXT + (LINKS if count > 1 else 0) + FRAGMENTS * max(backward, gradients + step))
        if backward + gathered < gradients + step:
            return Memory(weights, gradients, optimizer + step, 0, 0, 0, 0, overhead)
        there = gradients if sharded else held.gradients
        return Memory(weights, there, optimizer, held.copies, held.activations, held.logits, gathered, overhead)

    def _gathered(self, sizes: Sizes, train: Train) -> int:
        """What stands beside the shards for a while: in FSDP the units at work and the next one, and what is in none."""
        if self.on.count == 1:
            return 0
        if train.engine in ("ddp", "zero2"):
            return sizes.trained * (4 if train.engine == "ddp" else 0)
        half = train.precision == "bf16"
        return (2 if half else 4) * (2 * sizes.loose + 3 * sizes.unit) + half * 4 * sizes.unit  # summed in fp32

    def _way(self, stage: Stage, train: Train) -> Way:
        half = train.precision == "bf16" and train.engine != "ddp"
        lora = stage.lora if stage.lora.rank else None
        return Way(
            frozenset(stage.trains), autocast=train.precision == "bf16" and not half,
            half=half, checkpointing=train.checkpointing, adapt=None if lora is None else _Adapt(tuple(stage.trains), lora),
        )  # fmt: skip

    def shape(self, micro: int, packed: bool) -> Shape:
        """What one forward pass reads: `micro` images, each with the recipe's group of questions."""
        group, text = self.recipe.data.group, self.text
        return Shape(
            micro,
            self.config.num_image_tokens + text.front,
            (text.words,) * group,
            micro * group * text.answer,
            packed,
            stored=self.recipe.train.features is not None,
        )

    def _held(self, way: Way, micro: int, packed: bool, gradients: str) -> Held:
        return held_bytes(self.config, way, self.shape(micro, packed), gradients=gradients)

    def _flops(self, way: Way, micro: int, packed: bool) -> int:
        return micro * step_flops(self.config, way, self.shape(1, packed))

    def _sizes(self, way: Way) -> Sizes:
        with fake_model(self.config, way) as model:
            return Sizes.of(model)


@dataclass(frozen=True)
class _Adapt:
    """Puts a stage's adapters into a model, and lets learn what the stage says; equal where the stages' words are."""

    trains: tuple[str, ...]
    lora: Lora

    def __call__(self, model: Any) -> None:
        plain = dataclasses.replace(self.lora, bits=16)  # 4 bits are a matter of weights alone
        Adapters(model, plain, seed=0, dtype=torch.bfloat16)
        settle_parts(model, dict.fromkeys(self.trains, 0.0), plain)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, those that learn, the largest that does, those beside adapters, the largest unit that FSDP
    gathers at once, those in no unit, those that Muon would step on, and the most of these at once."""

    total: int
    trained: int
    largest: int
    beside: int
    unit: int
    loose: int
    hidden: int
    stack: int

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Of a model without memory."""
        parameters = dict(model.named_parameters())
        trained = [p for p in parameters.values() if p.requires_grad]
        learning = [p.numel() for p in trained]
        words = words_of(model)
        matrices = [p for p in trained if is_hidden(p, words)]
        alike = Counter(p.shape for p in matrices)
        stack = max((max(shape.numel(), min(n * shape.numel(), AT_ONCE)) for shape, n in alike.items()), default=0)
        split = set(model._no_split_modules or ())
        units = [m for m in model.modules() if type(m).__name__ in split]
        sizes = [sum(p.numel() for p in unit.parameters()) for unit in units] or [0]
        total = sum(p.numel() for p in parameters.values())
        beside = sum(p.numel() for name, p in parameters.items() if ".base_layer.weight" in name)
        hidden = sum(p.numel() for p in matrices)
        return cls(total, sum(learning), max(learning), beside, max(sizes), total - sum(sizes), hidden, stack)

    def weights_bytes(self, each: int, lora: Lora) -> int:
        """Of all weights; those beside adapters at 4 bits, with NF4's scales (arXiv 2305.14314: 0.127 bits more)."""
        packed = self.beside if lora.rank and lora.bits == 4 else 0
        return each * (self.total - packed) + round(packed * 4.127 / 8)


@dataclass(frozen=True)
class Change:
    """A setting that is not the recipe's: what is said, and what the stage and the training become."""

    says: str
    change: Callable[[Stage, Train], tuple[Stage, Train]]


def _changes(stage: Stage, train: Train, on: Machine) -> Iterator[Change]:
    micro, _ = shared_out(stage, on.count)
    if not train.checkpointing:
        yield Change("train.checkpointing true", lambda s, t: (s, dataclasses.replace(t, checkpointing=True)))
    if micro > 1:
        yield Change(
            f"train.stages.{stage.name}.micro_batch 1", lambda s, t: (dataclasses.replace(s, micro_batch=1), t)
        )
    if train.engine == "ddp" and on.count > 1:
        yield Change("train.engine fsdp", lambda s, t: (s, dataclasses.replace(t, engine="fsdp")))
    if not stage.lora.rank and "language_model" in stage.trains:
        lora = Lora(rank=16)
        yield Change(f"train.stages.{stage.name}.lora.rank 16", lambda s, t: (dataclasses.replace(s, lora=lora), t))


def remedies(planner: Planner, stage: Stage) -> list[tuple[str, int]]:
    """Settings that would change what a stage needs, each alone and then all so far together until one fits: what to say, and
    bytes left over, negative where it still does not fit."""
    train = planner.recipe.train
    found: list[tuple[str, int]] = []
    together: tuple[Stage, Train] = (stage, train)
    said: list[str] = []
    changes = list(_changes(stage, train, planner.on))

    def left(stage: Stage, train: Train) -> int:
        return int(planner.on.memory - planner.need(stage, train).total)

    found += [(change.says, left(*change.change(stage, train))) for change in changes]
    if any(over >= 0 for _, over in found):
        return found
    for change in changes:
        together = change.change(*together)
        said.append(change.says)
        if len(said) > 1:
            found.append((" and ".join(said), left(*together)))
        if found[-1][1] >= 0 and len(said) > 1:
            break
    return found


def paper_hours(planner: Planner, plan: StagePlan) -> float | None:
    """The paper's own hours of a stage, where the plan is of its run on its machine."""
    if (planner.on.name, planner.on.count) != ("a800-80", 8):
        return None
    return PAPER.get(planner.recipe.name, {}).get(plan.stage.name)
