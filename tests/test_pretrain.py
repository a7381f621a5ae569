"""The tiny parts' pretraining: a few updates of the real objectives, and what they claim about themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from commvlm.data.boxes import PadSquare
from commvlm.data.dialogue import encode
from commvlm.data.example import Example, Turn
from commvlm.data.templates import instruct
from commvlm.microworld.cards import write_card
from commvlm.microworld.pretrain import checkpoint, clip, dino, lm
from commvlm.microworld.pretrain.symbols import GRID, coverage, parted
from commvlm.microworld.pretrain.vit import keep_patches, new_clip
from commvlm.microworld.scene import sample_scene
from commvlm.microworld.tokenizer import build_tokenizer


def start(part, out, updates, minutes=None):
    if part == "lm":
        return lm.pretrain_lm(out, lm.LMBudget(updates=updates, scenes=2, questions=3), minutes=minutes)
    if part == "clip":
        budget = clip.CLIPBudget(updates=updates, batch=4, scenes=16)
        return clip.pretrain_clip(out, budget, cache=out.parent / "pool", minutes=minutes)
    budget = dino.DINOBudget(updates=updates, batch=4, locals=1, prototypes=16, scenes=16)
    return dino.pretrain_dino(out, budget, cache=out.parent / "pool", minutes=minutes)


def weights(out):
    return torch.load(out / "progress.pt", weights_only=True)["model"]


@pytest.mark.parametrize("part", ["lm", "clip", "dinov2"])
def test_a_stopped_run_goes_on_to_the_same_weights(part, tmp_path, monkeypatch):
    folder = start(part, tmp_path / "straight", 4)
    ask = checkpoint.Progress.updates

    def two(self, begin):
        for update in ask(self, begin):
            if update == begin + 2:
                return
            yield update

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Progress, "updates", two)
        start(part, tmp_path / "stopped", 4)
        assert torch.load(tmp_path / "stopped" / "progress.pt", weights_only=True)["update"] == 2
    start(part, tmp_path / "stopped", 4)
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(a[name], b[name]) for name in a)
    facts = json.loads((folder / "pretraining.json").read_text())
    assert facts["updates"] == 4
    with pytest.raises(ValueError, match="choose another folder"):
        start(part, tmp_path / "stopped", 5)


def test_kept_patches_are_the_whole_images_patches_with_their_positions():
    torch.manual_seed(0)
    model = new_clip(700, 2, 0).vision_model.eval()
    pixels = torch.randn(2, 3, 64, 64)
    whole = model.embeddings(pixels)
    kept = torch.tensor([[3, 17], [60, 0]])
    with keep_patches(model.embeddings, kept):
        some = model.embeddings(pixels)
    torch.testing.assert_close(some[:, 0], whole[:, 0])
    torch.testing.assert_close(some[1, 1], whole[1, 61])
    torch.testing.assert_close(some[0, 2], whole[0, 18])
    torch.testing.assert_close(model.embeddings(pixels), whole)


def test_a_patchs_coverage_is_the_share_of_its_pixels_inside_the_box():
    scene = sample_scene("val", 5)
    for row, thing in zip(coverage(scene), scene.things, strict=True):
        x1, y1, x2, y2 = thing.box
        inside = np.zeros((64, 64))
        inside[y1:y2, x1:x2] = 1
        counted = inside.reshape(GRID, 8, GRID, 8).mean((1, 3)).reshape(-1)
        np.testing.assert_allclose(row, counted)


def test_symbolic_dialogues_are_the_dialogues_that_the_model_will_be_trained_on():
    """The LM's packed pretraining ids, put together again, equal what the data room encodes for the same turn."""
    tokenizer = build_tokenizer()
    box = (2.0, 4.0, 20.0, 30.0)
    for task, turn in (
        ("rec", Turn("the red star", "<boxes>", answer_boxes=((box,),))),
        ("reg", Turn("<boxes>", "the red star", question_boxes=((box,),))),
        ("pope", Turn("Is there a cup in the image?", "no")),
    ):
        head, question, answer = parted(turn, task, tokenizer, rng=None)
        pieces = [head.replace("<image>", "<image>" * 64), question, answer]
        ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
        example = instruct(Example("a", task, Path("a.png"), (turn,)))
        encoded = encode(example, tokenizer, image_tokens=64, geometry=PadSquare(64, 64))
        assert ids == encoded.ids.tolist()
        assert (encoded.labels != -100).sum() == len(tokenizer.encode(answer, add_special_tokens=False))


def test_sinkhorn_uses_every_prototype_alike():
    torch.manual_seed(0)
    q = dino.sinkhorn(torch.randn(64, 8), 0.5, rounds=50)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)


def test_a_card_of_an_untrained_encoder_does_not_say_that_it_beats_its_twin(tmp_path):
    folder = start("clip", tmp_path / "clip", 1)
    card = json.loads(write_card(folder, train=40, test=30, steps=20).read_text())
    assert card["beats_twin"] is False
    assert len(card["probes"]["trained"]["rec"]) == len(card["layers"]) == 8
    assert card["objective"] == "image-text contrastive"


def test_a_card_needs_a_pretrained_part(tmp_path):
    with pytest.raises(ValueError, match="no pretraining"):
        write_card(tmp_path)


@pytest.mark.slow
def test_the_tiny_language_model_learns_presence_in_minutes(tmp_path):
    budget = lm.LMBudget(updates=400, scenes=8)
    folder = lm.pretrain_lm(tmp_path / "lm", budget)
    scores = lm.symbolic_scores(budget, folder, batches=2)
    assert scores["presence"] > 0.75
