"""Visual tokens as loud as words, where there is no projection to scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commvlm.train.assemble import assemble
from commvlm.train.calibrate import scale_visual_tokens

MLP = {"kind": "mlp", "hidden": 1, "ratio": 4, "out": "language-model"}
NOTHING = {"kind": "identity"}


def made(small, *, clip: dict, dinov2: dict):
    aligns = ["--model.encoders.clip.align", json.dumps(clip), "--model.encoders.dinov2.align", json.dumps(dinov2)]
    recipe = small("--model.fuse", "interleave", "--model.project", "identity", *aligns)
    model, processor = assemble(recipe.model)
    images = [Image.open(path) for path in sorted((Path(recipe.data.root) / "images").glob("*train*"))[:3]]
    return model, processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def loudness(model: Any, rows: torch.Tensor) -> float:
    """Of visual tokens, as a multiple of the words'."""
    tokens = torch.cat(model.get_image_features(rows, return_dict=True).pooler_output)
    words = model.get_input_embeddings().weight
    return float(tokens.pow(2).mean().sqrt() / words.pow(2).mean().sqrt())


def test_each_alignment_is_scaled(small):
    """As in MMVP: every encoder goes to the language model's width by an MLP of its own."""
    model, rows = made(small, clip=MLP, dinov2=MLP)
    scale_visual_tokens(model, rows, scale=1.5)
    assert loudness(model, rows) == pytest.approx(1.5, rel=1e-4)


def test_batch_norms_measure_by_the_batch_as_they_will_in_training(small):
    """Fresh, they have gathered nothing to go by; and what they gather is left to training."""
    recipe = small("--model.encoders.clip.merge", "conv-layerscale", "--model.encoders.dinov2.merge", "conv-layerscale")
    model, processor = assemble(recipe.model)
    images = [Image.open(path) for path in sorted((Path(recipe.data.root) / "images").glob("*train*"))[:6]]
    rows = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    before = {name: value.clone() for name, value in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    scale_visual_tokens(model, rows, scale=1.5)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    assert loudness(model.train(), rows) == pytest.approx(1.5, rel=1e-4)


def test_what_cannot_be_scaled_is_told(small):
    model, rows = made(small, clip=MLP, dinov2=NOTHING)
    with pytest.raises(ValueError, match=r"encoder dinov2 is aligned by none; leave train.visual_scale out"):
        scale_visual_tokens(model, rows, scale=1.5)
