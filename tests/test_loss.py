"""Logits where supervised, and nowhere else: the same loss and gradients as from all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_tiny import comm, pixels, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from commvlm.model import loss as module
from commvlm.model.memory import live_bytes
from commvlm.model.modeling import CommForConditionalGeneration

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loss")


@pytest.fixture(params=["llama", "qwen3"])
def model(request, root) -> CommForConditionalGeneration:
    return comm(root, language_model=request.param).train()


def batch_of(model: CommForConditionalGeneration, rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows of 27 tokens, of which 4, 3, 2 ... are supervised, the very last one among them."""
    ids = torch.cat([prompt(model, after=9, seed=seed) for seed in range(rows)])
    labels = torch.full_like(ids, -100)
    for row in range(rows):
        labels[row, -(4 - row) :] = ids[row, -(4 - row) :]
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels(model, rows)}


class Rows(TorchDispatchMode):
    """Rows of the largest tensor as wide as the vocabulary that was made inside; weights have `without` rows."""

    def __init__(self, vocabulary: int, without: int) -> None:
        super().__init__()
        self.vocabulary, self.without, self.most = vocabulary, without, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            wide = isinstance(t, torch.Tensor) and t.ndim > 0 and t.shape[-1] == self.vocabulary
            if wide and t.numel() // self.vocabulary != self.without:
                self.most = max(self.most, t.numel() // self.vocabulary)
        return result


def step(
    model: CommForConditionalGeneration, batch: dict[str, Any], **options: Any
) -> tuple[torch.Tensor, Gradients, int]:
    """Loss, gradients, and the most rows of logits that there were at once."""
    model.zero_grad()
    text = model.config.text_config
    with Rows(text.vocab_size, text.hidden_size) as rows:
        found = model(**batch, **options)
        found.loss.backward()
    return found.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, rows.most


def full_step(
    model: CommForConditionalGeneration, batch: dict[str, Any], **options: Any
) -> tuple[torch.Tensor, Gradients]:
    """The library's own loss, on all logits."""
    model.zero_grad()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert logits.shape[:2] == batch["labels"].shape
    loss = ForCausalLMLoss(logits, batch["labels"], model.config.text_config.vocab_size, **options)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[torch.Tensor, Gradients], expected: tuple[torch.Tensor, Gradients]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 50}, {"num_items_in_batch": torch.tensor(50)}])
def test_loss_and_gradients_are_those_of_all_logits(model, options):
    batch = batch_of(model)
    loss, gradients, rows = step(model, batch, **options)
    assert rows == 9  # 4 + 3 + 2 supervised of 81
    assert_same((loss, gradients), full_step(model, batch, **options))


def test_the_count_sees_all_logits_where_they_are_asked_for(model):
    assert step(model, batch_of(model), skip_logits=False)[2] == 81


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_a_slice_at_a_time_is_the_same(model, monkeypatch, at_once):
    batch = batch_of(model)
    expected = full_step(model, batch)
    monkeypatch.setattr(module, "AT_ONCE", at_once * model.config.text_config.vocab_size + 1)
    loss, gradients, rows = step(model, batch)
    assert rows == at_once
    assert_same((loss, gradients), expected)


def test_memory_follows_what_is_supervised_at_once(monkeypatch):
    """A head alone, 512 positions of 4,096 words: all at once hold several copies of the logits, slices one slice's."""
    head, hidden = torch.nn.Linear(8, 4096, bias=False), torch.randn(1, 513, 8, requires_grad=True)
    labels = torch.randint(0, 4096, (1, 513))
    peaks = {}
    for rows in (512, 64):
        monkeypatch.setattr(module, "AT_ONCE", rows * 4096)
        with live_bytes() as count:
            module.supervised_loss(head, hidden, labels, vocabulary=4096).backward()
        peaks[rows] = count.peak / (4096 * 4)  # in rows of logits
    assert peaks[512] > 2 * 512
    assert peaks[64] < 4 * 64


def test_nothing_supervised_is_a_loss_of_zero_that_can_be_differentiated(model):
    batch = batch_of(model)
    batch["labels"].fill_(-100)
    loss, gradients, _ = step(model, batch, num_items_in_batch=7)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())
    assert torch.isnan(step(model, batch)[0])  # a mean over nothing


def test_logits_are_given_outside_training_and_where_there_are_no_labels(model):
    batch = batch_of(model)
    assert model(**batch).logits is None
    assert model(**{k: v for k, v in batch.items() if k != "labels"}).logits.shape[:2] == (3, 27)
    trained = model(**batch).loss
    found = model.eval()(**batch)
    assert found.logits.shape[:2] == (3, 27)
    torch.testing.assert_close(found.loss, trained)
