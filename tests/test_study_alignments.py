"""What is measured inside an alignment, against arithmetic by hand and autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from commvlm.data.collate import Collator
from commvlm.microworld.writer import write_world
from commvlm.study.alignments import effective_rank, first_rows, measure
from commvlm.study.experiments import aligned
from commvlm.study.runs import recipe_of
from commvlm.study.settings import load_scale
from commvlm.train.assemble import assemble
from commvlm.train.sources import stage_mixture, training_examples


def test_effective_rank_by_hand():
    rng = np.random.default_rng(0)
    plane = torch.tensor(rng.standard_normal((4000, 2)) @ rng.standard_normal((2, 6)))
    values = torch.linalg.eigvalsh(torch.cov(plane.T))
    assert effective_rank(plane) == pytest.approx(float(values.sum() ** 2 / (values**2).sum()), rel=1e-6)
    assert effective_rank(torch.eye(64, dtype=torch.float64) * 3) == pytest.approx(63)
    assert effective_rank(torch.ones(5, 3)) == 0


def test_the_rows_are_what_the_run_sees_and_leaves_out(tmp_path):
    """A missing image is an error, or another group's turn, as in training; a blind run's rows are grey."""
    scale = load_scale("micro")
    world = write_world(tmp_path / "world", train=4, test=2)
    recipe = recipe_of(scale, aligned(scale, scale.encoder("mae"), 1, 16), 0, data=str(world))
    model, processor = assemble(recipe.model)
    grey = first_rows(replace(recipe, data=replace(recipe.data, pixels="grey")), model, processor)
    assert len({float(value) for value in grey[0]["pixel_values"].flatten().round(decimals=3).unique()}) <= 6
    whole = first_rows(recipe, model, processor)
    next(iter(sorted((world / "images").glob("*train*")))).unlink()
    with pytest.raises(ValueError, match="image"):
        first_rows(recipe, model, processor)
    skipping = replace(recipe, data=replace(recipe.data, faults="skip"))
    rows = first_rows(skipping, model, processor)
    assert len(rows) == len(whole)
    assert any(not torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rows, whole, strict=True))


def whole_batch(recipe, model, processor):
    """The rows as one batch."""
    stage = recipe.train.stages[0]
    mixture = stage_mixture(stage, recipe.data, training_examples(recipe.data), seed=recipe.train.seed)
    images = processor.image_processor
    collator = Collator(
        processor.tokenizer, images, model.config.num_image_tokens, layout="mask", geometry=images.geometry
    )
    return collator([mixture[index] for index in range(8)])


def test_gradients_and_spread_are_those_of_the_layers_themselves(tmp_path):
    scale = load_scale("micro")
    world = write_world(tmp_path / "world", train=4, test=2)
    recipe = recipe_of(scale, aligned(scale, scale.encoder("mae"), 2, 4), 0, data=str(world))
    model, processor = assemble(recipe.model)
    rows = first_rows(recipe, model, processor)
    assert [len(row["pixel_values"]) for row in rows] == [1] * 8
    found = measure(model, rows)["mae"]
    assert len(found) == 3  # two hidden layers and the one out
    model.zero_grad()
    batch = whole_batch(recipe, model, processor)
    model(**batch).loss.backward()
    align = model.model.vision_tower.branches["mae"].align
    linears = [part for part in align if isinstance(part, nn.Linear)]
    merged = []
    handle = align.register_forward_pre_hook(lambda module, given: merged.append(given[0]))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        first = linears[0](merged[0]).flatten(0, 1)
    assert found[0]["spread"] == pytest.approx(float(first.std(0).mean()), rel=1e-4)
    for facts, linear in zip(found, linears, strict=True):
        assert facts["gradient_norm"] == pytest.approx(
            float(linear.weight.grad.norm() / linear.weight.norm()), rel=1e-4
        )
        assert 1 <= facts["rank"] <= 512
