"""Why deep alignments fail: what activations and gradients do, layer by layer, inside an MLP between encoder and fuse."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collate import Collator
from ..model.align import MLP
from ..model.modeling import CommForConditionalGeneration
from ..model.processing import CommProcessor
from ..train.assemble import assemble
from ..train.calibrate import scale_visual_tokens
from ..train.recipe import Recipe
from ..train.sources import stage_mixture, training_examples

IMAGES = 8


def alignment_facts(recipe: Recipe, trained: Path) -> dict[str, Any]:
    """Encoder -> {"start": [...], "end": [...]}, one entry per linear layer of its MLP, before and after training, on the
    same first images of the run; {} for a model without an MLP."""
    if not any(_kind(branch.align) == "mlp" for branch in recipe.model.encoders):
        return {}
    model, processor = assemble(recipe.model, seed=recipe.train.seed, start=recipe.train.start)
    batch = _batch(recipe, model, processor)
    if recipe.train.visual_scale is not None and not recipe.train.start:
        scale_visual_tokens(model, batch["pixel_values"], scale=recipe.train.visual_scale)
    start = measure(model, batch)
    del model  # two of them need not be there at once
    end = measure(CommForConditionalGeneration.from_pretrained(trained), batch)
    return {name: {"start": start[name], "end": end[name]} for name in start}


def measure(model: CommForConditionalGeneration, batch: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Encoder -> per linear layer of its MLP: gradient_norm of its weights under the loss, relative to the weights' own norm;
    spread, the standard deviation over tokens of what it gives; rank, how many directions that takes up (participation
    ratio of the covariance's eigenvalues)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()  # pyright: ignore[reportArgumentType]
    model.requires_grad_(False)
    given: dict[tuple[str, int], Tensor] = {}
    layers = {
        (name, number): layer
        for name, branch in model.model.vision_tower.branches.items()
        if isinstance(branch.align, MLP)
        for number, layer in enumerate(part for part in branch.align if isinstance(part, nn.Linear))
    }
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    hooks = [layer.register_forward_hook(partial(_keep, given, place)) for place, layer in layers.items()]
    try:
        model(**{name: _on(device, value) for name, value in batch.items()}).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, list[dict[str, float]]] = {}
    for (name, number), layer in layers.items():
        tokens = given[name, number].flatten(0, -2).float()
        assert layer.weight.grad is not None
        norm = layer.weight.grad.norm() / layer.weight.detach().norm()
        facts = {"gradient_norm": float(norm), "spread": float(tokens.std(0).mean()), "rank": effective_rank(tokens)}
        found.setdefault(name, []).append(facts)
    return found


def _on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _keep(given: dict[tuple[str, int], Tensor], place: tuple[str, int], *call: Any) -> None:
    """A forward hook: call is (module, inputs, output)."""
    given[place] = call[-1].detach()


def effective_rank(tokens: Tensor) -> float:
    """Participation ratio of the covariance's eigenvalues, (sum l)^2 / sum l^2: (n, d) -> 1 to d; 0 where nothing varies."""
    centred = tokens - tokens.mean(0)
    values = torch.linalg.svdvals(centred).square()
    return float(values.sum() ** 2 / values.square().sum()) if values.sum() > 0 else 0.0


def _batch(recipe: Recipe, model: CommForConditionalGeneration, processor: CommProcessor) -> dict[str, Any]:
    stage = recipe.train.stages[0]
    mixture = stage_mixture(stage, recipe.data, training_examples(recipe.data), seed=recipe.train.seed)
    collator = Collator(
        processor.tokenizer, processor.image_processor, model.config.num_image_tokens, max_length=recipe.train.max_length,
        layout="mask", geometry=processor.image_processor.geometry,
    )  # fmt: skip
    return collator([mixture[index] for index in range(min(IMAGES, stage.batch))])


def _kind(align: Any) -> str:
    return align if isinstance(align, str) else align["kind"]
