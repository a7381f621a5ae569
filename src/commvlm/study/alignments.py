"""Why deep alignments fail: what activations and gradients do, layer by layer, inside an MLP between encoder and fuse."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collate import Collator
from ..data.spares import Spares
from ..model.align import MLP
from ..model.loss import IGNORED
from ..model.modeling import CommForConditionalGeneration
from ..model.processing import CommProcessor
from ..train.assemble import assemble
from ..train.calibrate import scale_visual_tokens
from ..train.recipe import Recipe
from ..train.sources import stage_mixture, training_examples

IMAGES = 8


def alignment_facts(recipe: Recipe, trained: Path) -> dict[str, Any]:
    """Encoder -> {"start": [...], "end": [...]}, one entry per linear layer of its MLP, before and after training, on the
    same first images of the run; {} for a model without an MLP. On a GPU in the run's own precision."""
    if not any(_kind(branch.align) == "mlp" for branch in recipe.model.encoders):
        return {}
    model, processor = assemble(recipe.model, seed=recipe.train.seed, start=recipe.train.start)
    rows = first_rows(recipe, model, processor)
    if recipe.train.visual_scale is not None and not recipe.train.start:
        scale_visual_tokens(model, torch.cat([row["pixel_values"] for row in rows]), scale=recipe.train.visual_scale)
    half = recipe.train.precision == "bf16" and torch.cuda.is_available()
    start = measure(model, rows, half=half)
    del model  # two of them need not be there at once
    end = measure(CommForConditionalGeneration.from_pretrained(trained), rows, half=half)
    return {name: {"start": start[name], "end": end[name]} for name in start}


def measure(
    model: CommForConditionalGeneration, rows: Sequence[dict[str, Any]], *, half: bool = False
) -> dict[str, list[dict[str, float]]]:
    """Encoder -> per linear layer of its MLP: gradient_norm of its weights under the loss of all rows, relative to the
    weights' own norm; spread, the standard deviation over tokens of what it gives; rank, how many directions that takes up
    (participation ratio of the covariance's eigenvalues).

    rows: batches of one image each, one after another, since a large model holds the activations of one at a time. half: with
    bfloat16 by autocast.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    model.to(device).train()  # pyright: ignore[reportArgumentType]
    model.requires_grad_(False)
    given: dict[tuple[str, int], list[Tensor]] = {}
    layers = {
        (name, number): layer
        for name, branch in model.model.vision_tower.branches.items()
        if isinstance(branch.align, MLP)
        for number, layer in enumerate(part for part in branch.align if isinstance(part, nn.Linear))
    }
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    hooks = [layer.register_forward_hook(partial(_keep, given, place)) for place, layer in layers.items()]
    supervised = sum(int((row["labels"][:, 1:] != IGNORED).sum()) for row in rows)
    try:
        for row in rows:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                said = model(**{name: _on(device, value) for name, value in row.items()}, num_items_in_batch=supervised)
            said.loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, list[dict[str, float]]] = {}
    for (name, number), layer in layers.items():
        tokens = torch.cat(given[name, number]).float()
        assert layer.weight.grad is not None
        norm = layer.weight.grad.norm() / layer.weight.detach().norm()
        facts = {"gradient_norm": float(norm), "spread": float(tokens.std(0).mean()), "rank": effective_rank(tokens)}
        found.setdefault(name, []).append(facts)
    return found


def _on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _keep(given: dict[tuple[str, int], list[Tensor]], place: tuple[str, int], *call: Any) -> None:
    """A forward hook: call is (module, inputs, output)."""
    given.setdefault(place, []).append(call[-1].detach().flatten(0, -2))


def effective_rank(tokens: Tensor) -> float:
    """Participation ratio of the covariance's eigenvalues, (sum l)^2 / sum l^2: (n, d) -> 1 to d; 0 where nothing varies."""
    centred = tokens - tokens.mean(0)
    values = torch.linalg.svdvals(centred).square()
    return float(values.sum() ** 2 / values.square().sum()) if values.sum() > 0 else 0.0


def first_rows(recipe: Recipe, model: CommForConditionalGeneration, processor: CommProcessor) -> list[dict[str, Any]]:
    """The first images of a run as it sees them, a batch each; groups that it leaves out are left out here."""
    stage = recipe.train.stages[0]
    mixture = stage_mixture(stage, recipe.data, training_examples(recipe.data), seed=recipe.train.seed)
    collator = Collator(
        processor.tokenizer, processor.image_processor, model.config.num_image_tokens, max_length=recipe.train.max_length,
        layout="mask", geometry=processor.image_processor.geometry, pixels=recipe.data.pixels,
        spare=None if recipe.data.faults == "refuse" else Spares(mixture, Path(os.devnull)),
    )  # fmt: skip
    rows = [collator([mixture[index]]) for index in range(min(IMAGES, stage.batch))]
    return [row for row in rows if "pixel_values" in row]


def _kind(align: Any) -> str:
    return align if isinstance(align, str) else align["kind"]
