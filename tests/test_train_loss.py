"""The loss of a batch, however it is cut up, and the gradients of a step, against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import Tensors, log_of, one_stage
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from commvlm.data.collate import Collator
from commvlm.data.example import Example
from commvlm.model import CommForConditionalGeneration
from commvlm.train.assemble import assemble, load_tokenizer
from commvlm.train.parts import settle_parts
from commvlm.train.recipe import Recipe
from commvlm.train.sources import named_examples, stage_mixture
from commvlm.train.stage import run_stage
from commvlm.train.trainer import StageTrainer

pytestmark = pytest.mark.usefixtures("imported")


def gradients_of_a_step(recipe: Recipe, folder: Path) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
    """What one step of the real thing accumulates before clipping, the weights after it, and its log."""
    model, processor = assemble(recipe.model)
    stage = recipe.train.stages[0]
    settle_parts(model, stage.trains)
    sums: Tensors = {}

    def add(name: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            sums[name] = sums[name] + gradient if name in sums else gradient.clone()

        return hook

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(add(name))
    examples = named_examples(recipe.data.sources, Path(recipe.data.root))
    (folder / "stage").mkdir(parents=True)
    run_stage(recipe, stage, model, processor, examples, folder / "stage", log=folder / "log.jsonl")
    return sums, {name: p.detach() for name, p in model.named_parameters()}, log_of(folder)


def gradients_by_hand(recipe: Recipe) -> tuple[Tensors, float, list[int]]:
    """Each example a row of its own: sum of cross entropies over all supervised tokens / their number."""
    model, processor = assemble(recipe.model)
    model.model.language_model.set_attn_implementation("eager")
    stage = recipe.train.stages[0]
    settle_parts(model, stage.trains)
    examples = named_examples(recipe.data.sources, Path(recipe.data.root))
    mixture = stage_mixture(stage, recipe.data, examples, seed=recipe.train.seed)
    collator = Collator(processor.tokenizer, processor.image_processor, model.config.num_image_tokens)
    groups = [mixture[index] for index in range(stage.batch)]
    batches = [collator([[example]]) for group in groups for example in group]
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    total = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum") / sum(counts)
        loss.backward()
        total += float(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return gradients, total, [sum(counts[k : k + len(groups[0])]) for k in range(0, len(counts), len(groups[0]))]


def assert_close(found: Tensors, expected: Tensors, tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=tolerance, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


class TestTheLossOfABatch:
    """One update of 8 groups of 2, in fp32, whichever way it is computed."""

    @pytest.fixture(scope="class")
    def options(self) -> list[str]:
        return ["--train.precision", "fp32", "--train.log_every", "1", "--train.visual_scale", "null"]

    @pytest.fixture(scope="class")
    def by_hand(self, small, options) -> tuple[Tensors, float, list[int]]:
        return gradients_by_hand(small(*options, stages=one_stage(batch=8)))

    def test_halves_of_the_batch_weigh_differently(self, by_hand):
        """Otherwise a mean of means would pass."""
        counts = by_hand[2]
        assert len(counts) == 8
        assert len({sum(counts[k : k + 2]) for k in range(0, 8, 2)}) > 1

    @pytest.mark.parametrize(
        ("attention", "micro"), [("sdpa", 8), ("sdpa", 2), ("shared-prefix", 8), ("shared-prefix", 2), ("eager", 4)]
    )
    def test_is_the_sum_over_supervised_tokens_by_their_number(
        self, small, options, by_hand, tmp_path, attention, micro
    ):
        stages = one_stage(batch=8, micro_batch=micro)
        recipe = small(*options, "--train.attention", attention, stages=stages)
        sums, _, log = gradients_of_a_step(recipe, tmp_path)
        gradients, loss, _ = by_hand
        assert_close(sums, gradients)
        assert log[0]["loss"] == pytest.approx(loss, rel=1e-5)
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert log[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)

    @pytest.mark.parametrize("clip", [1.0, 0.5, 0.0])
    def test_gradients_are_clipped_as_a_whole(self, small, options, tmp_path, monkeypatch, clip):
        """AdamW's first step would not show it: to the length of `clip` at most, in their own direction; 0 leaves them."""
        lengths = []
        own = StageTrainer._clip_grad_norm

        def watched(trainer: StageTrainer, model: torch.nn.Module) -> Any:
            given = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            before = torch.cat([g.flatten() for g in given]).double()
            found = own(trainer, model)
            after = torch.cat([g.flatten() for g in given]).double()
            lengths.append(
                (float(before.norm()), float(after.norm()), float(before @ after / before.norm() / after.norm()))
            )
            return found

        monkeypatch.setattr(StageTrainer, "_clip_grad_norm", watched)
        gradients_of_a_step(small(*options, stages=one_stage(batch=2, clip=clip)), tmp_path)
        ((before, after, cosine),) = lengths
        assert before > 1.5
        assert after == pytest.approx(clip or before, rel=1e-4)
        assert cosine == pytest.approx(1, abs=1e-4)

    def test_the_updated_weights_are_adams(self, small, options, by_hand, tmp_path):
        """The first step of AdamW by hand: w (1 - lr decay) - lr g / (|g| + eps), g clipped to norm 1; a rate a part."""
        rates = {"merge": 1e-3, "align": 2e-3, "project": 3e-3, "language_model": 5e-4}
        stages = one_stage(batch=8, micro_batch=2, trains=rates, decay=0.1)
        recipe = small(*options, "--train.attention", "sdpa", stages=stages)
        model, _ = assemble(recipe.model)
        owner = {id(p): part for part, module in model.parts().items() for p in module.parameters()}
        _, after, _ = gradients_of_a_step(recipe, tmp_path)
        gradients = by_hand[0]
        scale = min(1.0, 1 / float(torch.stack([g.norm() for g in gradients.values()]).norm()))
        for name, parameter in model.named_parameters():
            rate = rates.get(owner[id(parameter)], 0.0)
            kept = parameter.detach() * (1 - rate * (0.1 if parameter.ndim > 1 else 0.0))
            if rate:
                gradient = gradients[name] * scale
                sure = gradient.abs() > 1e-5  # below, the sign itself is rounding
                assert sure.any(), name
                expected = kept - rate * gradient / (gradient.abs() + 1e-8)
                torch.testing.assert_close(after[name][sure], expected[sure], atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(after[name], kept)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A small Llama with grouped queries and the micro world's tokenizer, saved."""
    folder = tmp_path_factory.mktemp("llama") / "llama"
    tokenizer = load_tokenizer("micro:lm")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TestPackedRows:
    """Several dialogues behind one image, and several images in one row, through the whole model with pixels."""

    @pytest.fixture(scope="class", params=[("qwen3", 0), ("llama", 1), ("llama", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
    def built(self, request, small) -> tuple[CommForConditionalGeneration, Any, list[list[Example]]]:
        family, seed = request.param
        name = "micro:lm" if family == "qwen3" else request.getfixturevalue("llama")
        recipe = small("--model.language_model", name, "--data.group", "4", stages=one_stage(steps=1, batch=4))
        model, processor = assemble(recipe.model, seed=seed)
        assert model.config.text_config.model_type == family
        settle_parts(model, recipe.train.stages[0].trains)
        examples = named_examples(recipe.data.sources, Path(recipe.data.root))
        mixture = stage_mixture(recipe.train.stages[0], recipe.data, examples, seed=seed)
        groups = [mixture[index][:count] for index, count in enumerate((4, 1, 3, 2))]
        return model.train(), processor, groups

    def batch(self, built: Any, layout: str, *, rows: str = "packed") -> dict[str, Any]:
        model, processor, groups = built
        if rows == "separate":
            groups = [[example] for group in groups for example in group]
        collator = Collator(
            processor.tokenizer, processor.image_processor, model.config.num_image_tokens, layout=layout
        )
        return collator(groups)

    def run(self, built: Any, layout: str, attention: str, *, rows: str = "packed") -> tuple[float, Tensors]:
        model = built[0]
        model.model.language_model.set_attn_implementation(attention)
        model.zero_grad()
        batch = self.batch(built, layout, rows=rows)
        loss = model(**batch, num_items_in_batch=int((batch["labels"] != -100).sum())).loss
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def test_equal_rows_of_their_own(self, built):
        loss, gradients = self.run(built, "mask", "sdpa", rows="separate")
        assert {name.split(".")[1] for name in gradients} >= {"vision_tower", "multi_modal_projector", "language_model"}
        for layout, attention, rows in (
            ("joined", "shared-prefix", "packed"),
            ("joined", "shared-prefix", "separate"),  # images packed behind each other, one question each
            ("joined", "sdpa", "packed"), ("joined", "eager", "separate"),
            ("mask", "sdpa", "packed"), ("mask", "eager", "packed"),
        ):  # fmt: skip
            other_loss, other = self.run(built, layout, attention, rows=rows)
            assert loss == pytest.approx(other_loss, rel=1e-5), (layout, attention, rows)
            assert_close(other, gradients)

    def test_nothing_passes_between_branches_and_images(self, built):
        """What the first image's first branch says changes nothing but itself; what its prefix says changes all its branches,
        and no other image."""
        model = built[0].eval()
        model.model.language_model.set_attn_implementation("shared-prefix")
        batch = self.batch(built, "joined")
        labels = batch.pop("labels")
        (p, first, *_), *_ = batch["segments"]
        image = sum(batch["segments"][0])
        with torch.no_grad():
            before = model(**batch).logits[0]
            changed = batch["input_ids"].clone()
            changed[:, p : p + first] = 40
            branch = model(**{**batch, "input_ids": changed}).logits[0]
            changed = batch["input_ids"].clone()
            changed[:, 0] = 40
            prefix = model(**{**batch, "input_ids": changed}).logits[0]
        model.train()
        assert torch.equal(before[:p], branch[:p])
        assert torch.equal(before[p + first :], branch[p + first :])
        assert not torch.allclose(before[p : p + first], branch[p : p + first])
        assert torch.equal(before[image:], prefix[image:])
        assert ((before[:image] - prefix[:image]).abs().amax(-1) > 1e-4).all()
        assert labels.shape[1] == len(before)

    def test_flex_attention_reads_the_same_row(self, built):
        """Forward only, and not compiled: on CPUs torch has no gradients for FlexAttention."""
        model = built[0]
        batch = self.batch(built, "joined")
        found = {}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for attention in ("sdpa", "flex_attention"):
                model.model.language_model.set_attn_implementation(attention)
                found[attention] = model(**batch, skip_logits=False)
        torch.testing.assert_close(found["flex_attention"].logits, found["sdpa"].logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found["flex_attention"].loss, found["sdpa"].loss, atol=1e-6, rtol=1e-6)

    def test_a_row_that_is_not_as_its_segments_say_is_refused_with_both_numbers(self, built):
        batch = self.batch(built, "joined")
        width = batch["input_ids"].shape[1]
        batch["segments"] = batch["segments"][1:]
        with pytest.raises(ValueError, match=rf"one row of \d+ tokens, the batch is \(1, {width}\)"):
            built[0](**batch)
