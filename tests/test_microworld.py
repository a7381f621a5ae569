"""The micro world against what can be counted: pixels, boxes, truths."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from commvlm.data.readers import read
from commvlm.microworld import language
from commvlm.microworld.scene import (
    DIFFICULTIES,
    SCALE,
    SIDE,
    SPLITS,
    Scene,
    Thing,
    covered,
    draw_thing,
    render,
    sample_scene,
)
from commvlm.microworld.shapes import COLORS, SHAPES
from commvlm.microworld.tokenizer import COORDINATES, build_tokenizer
from commvlm.microworld.writer import pope_lines, write_world

SCENES = [sample_scene("test", i) for i in range(60)]


def test_a_scene_is_a_function_of_split_and_index():
    assert sample_scene("train", 7) == sample_scene("train", 7)
    assert sample_scene("train", 7).things != sample_scene("test", 7).things
    np.testing.assert_array_equal(render(SCENES[3]), render(sample_scene("test", 3)))
    assert len({SPLITS[name] for name in SPLITS}) == len(SPLITS)


@pytest.mark.parametrize("name", SHAPES)
def test_a_drawing_touches_all_four_sides_of_its_box(name):
    thing = Thing(name, "white", (12, 20, 36, 40))
    canvas = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE))
    draw_thing(ImageDraw.Draw(canvas), thing, np.asarray(COLORS["white"]))
    assert canvas.getbbox() == tuple(v * SCALE for v in thing.box)


def test_pixels_show_the_object_where_its_box_says():
    thing = Thing("ball", "white", (12, 20, 36, 40))
    bright = render(Scene("test", 1, (thing,))).astype(int).min(-1) > 170
    ys, xs = np.nonzero(bright)
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == thing.box


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_layouts_keep_their_bounds(difficulty):
    world = DIFFICULTIES[difficulty]
    for index in range(80):
        things = sample_scene("val", index, difficulty).things
        assert world.objects[0] <= len(things) <= world.objects[1]
        assert len({(t.category, t.color) for t in things}) == len(things)
        for k, thing in enumerate(things):
            x1, y1, x2, y2 = thing.box
            assert thing.category in world.categories
            assert 0 <= x1 < x2 <= SIDE
            assert 0 <= y1 < y2 <= SIDE
            assert all(v % 2 == 0 for v in thing.box)
            assert all(covered(thing.box, other.box) <= world.overlap for other in things[:k])


def holds(expression: str, scene: Scene, thing: Thing) -> bool:
    """Whether an expression is true of a thing, read word by word: an oracle independent of the grammar's code."""
    words = expression.split()
    named = [w for w in words if w in SHAPES]
    colors = [w for w in words if w in COLORS]
    if (named and thing.category != named[0]) or (colors and thing.color != colors[0]):
        return False
    kin = [t for t in scene.things if not named or t.category == named[0]]
    x, y = thing.center
    if "left" in words:
        return all(x <= t.center[0] for t in kin)
    if "right" in words:
        return all(x >= t.center[0] for t in kin)
    if "top" in words:
        return all(y <= t.center[1] for t in kin)
    if "bottom" in words:
        return all(y >= t.center[1] for t in kin)
    if "large" in words:
        return thing.side == max(t.side for t in kin)
    if "small" in words:
        return thing.side == min(t.side for t in kin)
    return True


def test_an_expression_is_true_of_its_object_alone():
    seen = set()
    for scene in [*SCENES, *(sample_scene("val", i, "hard") for i in range(60))]:
        for thing in scene.things:
            for expression in language.expressions(scene, thing):
                seen.add(expression.split()[-1])
                assert [t for t in scene.things if holds(expression, scene, t)] == [thing], expression
    assert {"left", "right", "top", "bottom", "object"} <= seen


def test_questions_have_their_true_answers():
    rng = np.random.default_rng(0)
    answers = {"relation": set(), "count": set()}
    for scene in SCENES:
        count = language.count(scene, rng)
        name = next(c for c in SHAPES if f" {language.plural(c)} " in count.text)
        assert count.answer == str(sum(t.category == name for t in scene.things))
        answers["count"].add(count.answer)
        color = language.color(scene, rng)
        if color is not None:
            name = color.text.removesuffix("?").split()[-1]
            assert [t.color for t in scene.things if t.category == name] == [color.answer]
        relation = language.relation(scene, rng)
        if relation is not None:
            a, b = relation.things
            truth = {
                "left of": a.center[0] < b.center[0], "right of": a.center[0] > b.center[0],
                "above": a.center[1] < b.center[1], "below": a.center[1] > b.center[1],
            }  # fmt: skip
            word = next(w for w in truth if w in relation.text)
            assert relation.answer == ("yes" if truth[word] else "no")
            answers["relation"].add(relation.answer)
    assert answers["relation"] == {"yes", "no"}
    assert {"0", "1", "2"} <= answers["count"]


def test_captions_name_every_object_and_no_position():
    rng = np.random.default_rng(0)
    for scene in SCENES[:20]:
        for caption in language.captions(scene, rng):
            assert all(f"{t.color} {t.category}" in caption for t in scene.things)
            assert not set(caption.split()) & {"left", "right", "top", "bottom", "above", "below"}


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_pope_asks_as_many_absent_as_present_categories(strategy):
    rows = pope_lines(SCENES, strategy, "easy")
    by_image: dict[str, list[dict]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    for scene in SCENES:
        asked = by_image[scene.name]
        present = {t.category for t in scene.things}
        for row in asked:
            name = row["text"].removesuffix(" in the image?").split()[-1]
            assert (row["label"] == "yes") == (name in present)
        assert sum(row["label"] == "yes" for row in asked) * 2 == len(asked)


def test_pope_negatives_follow_their_strategy():
    single, pairs = language.co_occurrence("easy")
    rng = np.random.default_rng(0)
    scene = SCENES[0]
    present = {t.category for t in scene.things}
    others = [c for c in DIFFICULTIES["easy"].categories if c not in present]
    popular = language.absent(scene, "popular", 2, rng)
    assert min(single[c] for c in popular) >= max(single[c] for c in others if c not in popular)
    near = language.absent(scene, "adversarial", 2, rng)
    weight = {c: sum(pairs[p][c] for p in present) for c in others}
    assert min(weight[c] for c in near) >= max(weight[c] for c in others if c not in near)


def test_the_world_is_read_back_by_the_real_readers(tmp_path):
    world = write_world(tmp_path / "w", train=3, test=12)
    made = json.loads((world / "world.json").read_text())
    assert (made["train"], made["test"], made["difficulty"]) == (3, 12, "easy")
    images, test = world / "images", world / "test"
    rec = read("refer-jsonl", images=images, annotations=test / "rec.jsonl")
    boxes = {(e.image.name, e.turns[0].answer_boxes[0][0]) for e in rec}
    assert boxes == {(s.name, tuple(map(float, t.box))) for s in SCENES[:12] for t in s.things}
    captions = read("coco-captions", images=images, annotations=test / "captions.json", per="image")
    assert [len(e.references) for e in captions] == [5] * 12
    files = {"questions": test / "questions.json", "annotations": test / "annotations.json"}
    vqa = read("vqa", images=images, image_name="micro_test_{image_id:012d}.png", **files)
    assert all(e.image.exists() and len(e.references) == 10 for e in vqa)
    pope = read("pope", images=images, questions=test / "pope_popular.json", set_name="popular")
    assert {e.references for e in pope} == {("yes",), ("no",)}


def test_writing_goes_on_where_it_was_interrupted_and_refuses_another_world(tmp_path):
    world = write_world(tmp_path / "w", train=2, test=2)
    kept = {p.name: p.read_bytes() for p in (world / "images").iterdir()}
    (world / "world.json").rename(world / "world.part")
    (world / "test.part").mkdir()
    next((world / "images").glob("micro_test_*")).unlink()
    write_world(world, train=2, test=2)
    assert {p.name: p.read_bytes() for p in (world / "images").iterdir()} == kept
    with pytest.raises(ValueError, match="another world"):
        write_world(world, train=3, test=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        write_world(tmp_path / "mine", train=2, test=2)


def test_the_tokenizer_says_a_box_in_whole_coordinates_and_any_text_without_loss():
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(" [0.031,0.500,0.969,1.000]", add_special_tokens=False)
    assert len(ids) == 9
    assert set(tokenizer.convert_tokens_to_ids(list(COORDINATES))) >= set(ids[1::2])
    for text in ("Größe: 3.14159 – ☃ [0.523,0.1]", "where is the red star?", " an orange\nhourglass"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    for word in [*SHAPES, *COLORS, *map(language.plural, SHAPES), "yes", "no", "left", "above"]:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
