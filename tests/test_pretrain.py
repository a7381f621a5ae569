"""The tiny parts' pretraining: a few updates of the real objectives, and what they claim about themselves."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from commvlm.data.boxes import PadSquare
from commvlm.data.dialogue import encode
from commvlm.data.example import Example, Turn
from commvlm.data.templates import instruct
from commvlm.microworld.cards import write_card
from commvlm.microworld.pretrain import checkpoint, clip, deit, dino, lm, mae
from commvlm.microworld.pretrain.loop import go_on
from commvlm.microworld.pretrain.pool import scene_pool
from commvlm.microworld.pretrain.run import ENCODERS, pretrain
from commvlm.microworld.pretrain.symbols import GRID, coverage, parted
from commvlm.microworld.pretrain.views import placed, recolored
from commvlm.microworld.pretrain.vit import keep_patches, new_clip, new_mae
from commvlm.microworld.scene import Thing, sample_scene
from commvlm.microworld.tokenizer import build_tokenizer
from commvlm.model.encoders import load_encoder, read_layers
from commvlm.model.families import truncate, vision_half
from commvlm.train.assemble import located


def start(part, out, updates, minutes=None):
    if part == "lm":
        return lm.pretrain_lm(out, lm.LMBudget(updates=updates, scenes=2, questions=3), minutes=minutes)
    small = {"updates": updates, "batch": 4, "scenes": 16}
    budget, trainer = {
        "clip": (clip.CLIPBudget(**small), clip.pretrain_clip),
        "dinov2": (dino.DINOBudget(**small, prototypes=16), dino.pretrain_dino),
        "mae": (mae.MAEBudget(**small), mae.pretrain_mae),
        "deit": (deit.DeiTBudget(**small), deit.pretrain_deit),
    }[part]
    return trainer(out, budget, cache=out.parent / "pool", minutes=minutes)


def weights(out):
    return torch.load(out / "progress.pt", weights_only=True)["model"]


@pytest.mark.parametrize(
    "part", ["lm", "dinov2", *(pytest.param(part, marks=pytest.mark.slow) for part in ("clip", "mae", "deit"))]
)
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
    assert (facts["updates"], facts["seed"]) == (4, 0)
    with pytest.raises(ValueError, match="choose another folder"):
        start(part, tmp_path / "stopped", 5)


def test_kept_patches_are_the_whole_images_patches_with_their_positions():
    torch.manual_seed(0)
    model = new_clip(700, 0).vision_model.eval()
    pixels = torch.randn(2, 3, 64, 64)
    whole = model.embeddings(pixels)
    kept = torch.tensor([[3, 17], [60, 0]])
    with keep_patches(model.embeddings, kept):
        some = model.embeddings(pixels)
    torch.testing.assert_close(some[:, 0], whole[:, 0])
    torch.testing.assert_close(some[1, 1], whole[1, 61])
    torch.testing.assert_close(some[0, 2], whole[0, 18])
    torch.testing.assert_close(model.embeddings(pixels), whole)


def test_a_new_mae_knows_where_its_patches_are():
    """Fixed sine-cosine positions in encoder and decoder; with the library's zeros every hidden patch is answered alike."""
    torch.manual_seed(0)
    model = new_mae().eval()
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        quarter = table.shape[-1] // 4
        frequencies = 10000.0 ** (-torch.arange(quarter) / quarter)
        assert not table[0, 0].any()
        at = table[0, 1 + 3 * GRID + 5]  # row 3, column 5
        torch.testing.assert_close(at[:quarter], (3 * frequencies).sin())
        torch.testing.assert_close(at[3 * quarter :], (5 * frequencies).cos())
    order = torch.rand(1, GRID**2)
    with torch.no_grad():
        seen = model.vit(torch.randn(1, 3, 64, 64), noise=order)
        said = model.decoder(seen.last_hidden_state, seen.ids_restore).logits[0]
    hidden = said[seen.mask[0].bool()]
    assert len(hidden) == 48
    assert torch.pdist(hidden).min() > 1e-3


def test_masked_targets_have_no_colour_of_their_own_and_plain_patches_hardly_anything():
    torch.manual_seed(0)
    drawn = torch.randn(1, 1, 64, 3)
    plain = torch.tensor([0.3, -0.2, 0.9]) + 0.07 * torch.randn(1, 1, 64, 3)
    target = mae.masked_targets(torch.cat([drawn, plain], 1).reshape(1, 2, 192)).view(2, 64, 3)
    torch.testing.assert_close(target.mean(1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    centred = drawn[0, 0] - drawn[0, 0].mean(0)
    torch.testing.assert_close(target[0], centred / (centred.square().mean() + mae.FLOOR).sqrt())
    assert target[1].square().mean() < 0.15


def test_the_dominant_object_is_the_largest_and_ties_share():
    small, wide, tall = (
        Thing("cup", c, b) for c, b in (("red", (0, 0, 14, 14)), ("blue", (0, 0, 20, 16)), ("white", (2, 2, 18, 22)))
    )
    assert deit.dominant([small, wide, tall]) == [wide, tall]
    assert deit.dominant([small]) == [small]
    assert deit.dominant([]) == []


def test_labels_are_shares_of_the_dominant_objects_in_every_phase(tmp_path):
    trainer = deit.DeiTTrainer(deit.DeiTBudget(updates=20, batch=8, scenes=16), tmp_path)
    for update, seen in ((0, 16), (12, 32), (19, None)):
        _, kept, target = trainer.batch(update)
        assert (kept is None) if seen is None else (kept.shape == (8, seen))
        torch.testing.assert_close(target.sum(1), torch.ones(8))


def test_a_placed_window_holds_the_point_that_it_is_around():
    rng = np.random.default_rng(0)
    centers = rng.uniform(8, 56, (64, 2))
    pixels = torch.full((64, 3, 64, 64), -1.0)
    for i, (x, y) in enumerate(centers):
        pixels[i, :, round(y) - 1 : round(y) + 1, round(x) - 1 : round(x) + 1] = 5.0
    views, kept = placed(pixels, centers, rng)
    assert kept.shape == (64, 16)
    patches = views.mean(1).reshape(64, 8, 8, 8, 8).amax((2, 4)).reshape(64, 64)
    inside = patches.gather(1, kept).amax(1)
    assert (inside > 1).all()


def test_recoloured_images_keep_their_brightness():
    pixels = torch.rand(30, 3, 8, 8)
    out = recolored(pixels, np.random.default_rng(0), grey=0.4, swapped=0.5)
    torch.testing.assert_close(out.mean(1), pixels.mean(1))
    grey = (out[:, 0] == out[:, 1]).flatten(1).all(1)
    assert 4 < grey.sum() < 20
    assert not torch.equal(out[~grey], pixels[~grey])


def test_two_looks_share_the_objects_and_nothing_else(tmp_path):
    scenes, first = scene_pool(tmp_path, 4)
    again, second = scene_pool(tmp_path, 4, look=1)
    assert scenes == again
    for scene, a, b in zip(scenes, first.astype(float), second.astype(float), strict=True):
        inside = np.zeros((64, 64), dtype=bool)
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            inside[y1:y2, x1:x2] = True
        difference = np.abs(a - b).mean(-1)
        assert np.median(difference[~inside]) > 1.0
        bright = (a.max(-1) > 150) & inside
        assert np.median(difference[bright]) < 30


def test_hidden_patches_are_half_of_the_images_and_a_part_of_what_is_seen():
    masks = dino.hidden_patches(400, 16, np.random.default_rng(0))
    share = masks.float().mean(1)
    assert 150 < (share > 0).sum() < 250
    assert share[share > 0].min() >= 2 / 16
    assert share.max() <= 9 / 16


def test_past_scores_join_the_teachers_balance_and_the_queue_is_bounded(tmp_path):
    trainer = dino.DINOTrainer(dino.DINOBudget(updates=2, batch=4, prototypes=8, queue=20, scenes=4), tmp_path)
    torch.manual_seed(0)
    scores = [torch.randn(8, 8) for _ in range(3)]
    torch.testing.assert_close(trainer.image_targets(scores[0], 0.5), dino.sinkhorn(scores[0], 0.5))
    trainer.image_targets(scores[1], 0.5)
    third = trainer.image_targets(scores[2], 0.5)
    kept = torch.cat([scores[2], scores[1], scores[0]])[:20]
    torch.testing.assert_close(third, dino.sinkhorn(kept, 0.5)[:8])
    assert torch.equal(trainer.past.scores, kept)


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


SHIPPED = sorted(
    card.parent for card in Path(str(resources.files("commvlm") / "microworld" / "weights")).glob("*/card.json")
)


def test_the_page_of_the_micro_world_says_what_the_cards_say():
    page = (Path(__file__).parents[1] / "docs" / "microworld.md").read_text()
    cards = {folder.name: json.loads((folder / "card.json").read_text()) for folder in SHIPPED}
    for name, card in cards.items():
        if "probes" in card:
            assert card_row(name, card) in page


def card_row(name, card):
    """| part | views | seconds | presence AUC | REC | random twin | own start | beats its twin | (layers of the best)"""

    def best(who, what):
        values = card["probes"][who][what]
        return f"{max(values):.3f} ({card['layers'][int(np.argmax(values))]})"

    def both(who):
        return f"{max(card['probes'][who]['presence_auc']):.3f} / {max(card['probes'][who]['rec']):.3f}"

    start = both("start") if "start" in card["probes"] else "the twin's"
    verdict = "yes" if card["beats_twin"] else "**no**"
    return (
        f"| `{name}` | {card['views']:,} | {card['seconds']:,.0f} | {best('trained', 'presence_auc')} | "
        f"{best('trained', 'rec')} | {both('random_twin')} | {start} | {verdict} |"
    )


@pytest.mark.parametrize("folder", [f for f in SHIPPED if f.name != "lm"], ids=lambda f: f.name)
def test_a_shipped_encoder_is_small_and_gives_every_layer_to_a_recipe(folder):
    assert (folder / "model.safetensors").stat().st_size <= 3.5e6
    name = f"micro:{folder.name}"
    config = vision_half(AutoConfig.from_pretrained(located(name)))
    encoder = load_encoder(located(name), truncate(config, 8))
    states = read_layers(encoder, torch.randn(1, 3, 64, 64), layers=range(1, 9))
    assert [tuple(state.shape) for state in states] == [(1, 64, 128)] * 8
    assert all(state.isfinite().all() for state in states)


def test_the_teacher_follows_the_student_after_every_update(tmp_path):
    budget = dino.DINOBudget(updates=1, batch=4, prototypes=8, queue=20, scenes=4, momentum=0.75)
    trainer = dino.DINOTrainer(budget, tmp_path)
    began = [p.clone() for p in trainer.teacher.parameters()]
    go_on(trainer, tmp_path / "run", "dinov2", {}, minutes=None)
    parameters = zip(began, trainer.teacher.parameters(), trainer.model.parameters(), strict=True)
    for start, teacher, student in parameters:
        torch.testing.assert_close(teacher, 0.75 * start + 0.25 * student)
    assert any(not torch.equal(a, b) for a, b in zip(began, trainer.teacher.parameters(), strict=True))


def test_a_caption_is_read_to_its_end(tmp_path):
    """What stands for a caption is the state of its last token, which has seen every word."""
    trainer = clip.CLIPTrainer(clip.CLIPBudget(updates=1, batch=4, scenes=4), tmp_path)
    captions = ["a red cup", "a red star", "an image with a blue cup, a green star and a red ring"]
    text = trainer.ids_of(captions)
    with torch.no_grad():
        read = trainer.model.text_model.eval()(**text)
    last = text["attention_mask"].sum(1) - 1
    torch.testing.assert_close(read.pooler_output, read.last_hidden_state[torch.arange(3), last])
    assert text["input_ids"].gather(1, last[:, None]).flatten().tolist() == [len(trainer.tokenizer)] * 3
    assert len(last.unique()) == 2
    one, other, _ = read.pooler_output
    assert not torch.allclose(one, other)


def test_clips_temperature_stays_where_its_authors_stop_it(tmp_path):
    trainer = clip.CLIPTrainer(clip.CLIPBudget(updates=1, batch=4, scenes=4), tmp_path)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(9.0)
    go_on(trainer, tmp_path / "run", "clip", {}, minutes=None)
    assert trainer.model.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.parametrize("part", ENCODERS)
def test_every_encoder_is_made_from_nothing_and_gets_its_card(part, tmp_path):
    """What `make encoders` does, with few scenes and updates."""
    folder = pretrain(part, tmp_path / part, cache=tmp_path / "pool", updates=4, scenes=64)
    card = json.loads(write_card(folder, train=60, test=40, steps=20).read_text())
    assert card["updates"] == 4
    assert card["beats_twin"] is False
    assert (folder / "model.safetensors").stat().st_size < 3.5e6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tiny_language_model_learns_presence_in_minutes(tmp_path):
    budget = lm.LMBudget(updates=400, scenes=8)
    folder = lm.pretrain_lm(tmp_path / "lm", budget)
    scores = lm.symbolic_scores(budget, folder, batches=2)
    assert scores["presence"] > 0.75
