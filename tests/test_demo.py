"""The web demo behind its page: a visitor's image, marks and dialogue, similarity maps, what its HTML says."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from commvlm.app.answering import Answerer
from commvlm.app.conversation import Answer
from commvlm.app.demo import markup, session
from commvlm.app.demo.seeing import SIDE, Seeing, shown_places
from commvlm.app.demo.session import Session
from commvlm.cli import main
from commvlm.data.example import Example
from commvlm.microworld.scene import sample_scene
from commvlm.train.assemble import assemble
from commvlm.train.recipe import load_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model, processor = assemble(load_recipe("micro").model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answerer(checkpoint) -> Answerer:
    return Answerer(checkpoint, max_new_tokens=3)


@pytest.fixture
def saying(answerer, monkeypatch):
    """saying(*texts): what the model says, in turn; what was off is written down."""
    off = []

    def say(*texts: str) -> list[str | None]:
        waiting = list(texts)

        def stream(example: Example, *, knock_out: str | None = None) -> Iterator[str]:
            off.append(knock_out)
            yield waiting.pop(0)

        monkeypatch.setattr(answerer, "stream", stream)
        return off

    return say


@pytest.fixture
def visitor(answerer) -> Iterator[Session]:
    visitor = Session(answerer)
    yield visitor
    visitor.close()


def photo(path: Path, size: tuple[int, int] = (96, 48), **options) -> Path:
    blocks = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(path, **options)
    return path


def test_the_command_names_the_extra_and_a_folder_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("commvlm.cli.demo.find_spec", lambda name: None)
    assert main(["demo", str(tmp_path)]) == 2
    monkeypatch.setattr("commvlm.cli.demo.find_spec", lambda name: name)
    assert main(["demo", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == ("commvlm: error: the demo needs gradio, which is not installed: pip install 'commvlm[demo]'")
    assert "is no checkpoint: no config.json" in said[1]


# Images


def test_a_scene_is_picked_with_its_first_object_marked_and_questions_about_it(visitor):
    visitor.pick(3)
    scene = sample_scene("test", 3)
    assert visitor.point == scene.things[0].center
    assert (visitor.stage()["width"], visitor.stage()["height"], visitor.stage()["snap"]) == (64, 64, 2)
    asked = visitor.suggestions()
    assert f"Where is the {scene.things[0].color} {scene.things[0].category}?" in asked
    assert any(question.startswith("Is there a") for question in asked)


def test_an_upload_is_turned_upright_and_keeps_its_pixels(visitor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = photo(tmp_path / "photo.jpg", exif=exif, quality=95)
    visitor.upload(path)
    assert visitor.about.size == (48, 96)
    with Image.open(path) as stored, Image.open(visitor.about.image) as kept:
        upright = stored.convert("RGB").transpose(Image.Transpose.ROTATE_270)
        assert np.array_equal(np.asarray(kept), np.asarray(upright))
    assert visitor.scene is None
    assert visitor.stage()["snap"] == 1


def test_a_large_image_is_sent_reduced_and_asked_whole(visitor, tmp_path):
    visitor.upload(photo(tmp_path / "large.png", (2560, 1280)))
    assert visitor.stage()["width"] == 2560
    assert visitor.picture().startswith("data:image/jpeg;base64,")
    assert len(visitor.picture()) < 700_000


def test_uploads_that_cannot_be_used_are_refused_and_the_image_stays(visitor, tmp_path, monkeypatch):
    visitor.pick(0)
    before = visitor.about
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(photo(tmp_path / "whole.png").read_bytes()[:200])
    photo(tmp_path / "broad.png", (128, 64))
    monkeypatch.setattr(session, "MAX_PIXELS", 96 * 48)
    visitor.upload(tmp_path / "whole.png")
    before = visitor.about
    for name, said in (("text", "no image that can be read"), ("cut", "damaged or truncated"), ("broad", "more than")):
        with pytest.raises(ValueError, match=said) as error:
            visitor.upload(tmp_path / f"{name}.png")
        assert str(tmp_path) not in str(error.value)
        assert visitor.about is before
    monkeypatch.setattr(session, "MAX_SIDE", 90)
    with pytest.raises(ValueError, match="or 90 on a side"):
        visitor.upload(tmp_path / "whole.png")
    monkeypatch.setattr(session, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="smaller first"):
        visitor.upload(tmp_path / "whole.png")


def test_a_visitor_that_leaves_takes_the_images_along(answerer):
    visitor = Session(answerer)
    visitor.pick(1)
    replaced = visitor.about.image
    visitor.pick(0)
    image = visitor.about.image
    assert image.is_file()
    assert not replaced.exists()
    visitor.close()
    assert not image.exists()
    assert not image.parent.exists()


# Marks and dialogue


def test_marks_are_bounded_by_the_image_and_checked(visitor):
    with pytest.raises(ValueError, match="no image yet"):
        visitor.mark_point([1, 2])
    visitor.pick(0)
    assert visitor.mark_point([-3, 99.5]) == (0, 64)
    assert visitor.mark_box([40, 30, 20, 10]) == (20, 10, 40, 30)
    for bad in (None, [1], [1, 2, 3], ["1", "2"], {"x": 1}, [float("nan"), 1]):
        with pytest.raises(ValueError, match="2 numbers in pixels"):
            visitor.mark_point(bad)


def test_boxes_are_staged_in_pixels_of_the_image(visitor, saying, tmp_path):
    visitor.upload(photo(tmp_path / "photo.png"))  # 96 x 48 in a square of 96 below 24 pixels of padding
    saying("it is at [0.500,0.500,0.750,0.625]")
    (last,) = visitor.ask("what is in [8,8,40,30]?")
    assert [mark["box"] for mark in visitor.stage(last)["marks"]] == [(48.0, 24.0, 72.0, 36.0)]
    asked, answered = visitor.stage()["marks"]
    assert (asked["box"], asked["label"]) == ((8, 8, 40, 30), "asked")
    assert answered["box"] == (48.0, 24.0, 72.0, 36.0)
    visitor.anew()
    assert visitor.stage()["marks"] == []


def test_an_answer_without_a_part_stands_beside_the_first(visitor, saying):
    visitor.pick(0)
    off = saying("at [0,0,0.5,0.5]", "at [0.25,0,0.5,0.5]")
    with pytest.raises(ValueError, match="nothing has been asked"):
        list(visitor.ask_without(["dinov2"]))
    list(visitor.ask("where?"))
    with pytest.raises(ValueError, match="nothing is switched off"):
        list(visitor.ask_without([]))
    list(visitor.ask_without(["dinov2", "clip:1"]))
    assert off == [None, "dinov2,clip:1"]
    marks = visitor.stage()["marks"]
    assert [mark["label"] for mark in marks] == ["all on", "without"]
    assert marks[1]["box"] == (16, 0, 32, 32)
    assert marks[1]["dashed"]
    assert len(visitor.about.turns) == 1


def test_the_real_model_says_what_is_wrong_with_a_part(visitor):
    visitor.pick(0)
    list(visitor.ask("where?"))
    for part, said in (
        ("clap", "no encoder 'clap'"),
        ("clip:99", "beyond the last one"),
        ("clip,dinov2", "leaves nothing on"),
    ):
        with pytest.raises(ValueError, match=said):
            list(visitor.ask_without([part]))


def test_questions_are_bounded(visitor):
    visitor.pick(0)
    with pytest.raises(ValueError, match="2001 characters"):
        visitor.ask("a" * 2001)


# What the encoders see


def test_maps_are_cosines_of_the_librarys_own_hidden_states(answerer, tmp_path):
    image = photo(tmp_path / "photo.png")
    seeing = Seeing(answerer, image)
    point = (70.0, 10.0)  # u = 70/96, v = (10 + 24)/96 -> column 5, row 2 of 8
    found = {(one.encoder, one.what): one for one in seeing.maps(point)}
    vision = answerer.model.model.vision_tower
    assert [what for name, what in found if name == "clip"] == ["layer 1", "layer 4", "layer 8", "merged"]
    with Image.open(image) as picture:
        pixels = answerer.processor.image_processor(images=[picture.convert("RGB")], return_tensors="pt")[
            "pixel_values"
        ]
    for name, part in zip(("clip", "dinov2"), vision.split_pixels(pixels), strict=True):
        with torch.no_grad():
            states = vision.encoder(name)(pixel_values=part, output_hidden_states=True).hidden_states
        for layer in (1, 4, 8) if name == "clip" else (5, 6, 8):
            tokens = states[layer][0, 1:]
            cosines = F.cosine_similarity(tokens, tokens[2 * 8 + 5], dim=-1)
            assert found[name, f"layer {layer}"].low == pytest.approx(float(cosines.min()), abs=1e-4)


def test_the_marked_patch_is_framed_and_the_brightest(answerer, tmp_path):
    photo(tmp_path / "grey.png")
    Image.new("RGB", (96, 48), (90, 90, 90)).save(tmp_path / "grey.png")
    seeing = Seeing(answerer, tmp_path / "grey.png")
    rows = np.zeros((64, 4), dtype=np.float32)
    rows[:, 0], rows[21] = 1, (0, 1, 0, 0)
    seeing.tokens = [dataclasses.replace(seeing.tokens[0], unit=rows)]
    (one,) = seeing.maps((70.0, 10.0))
    shown = np.asarray(one.picture.convert("L"), dtype=int)
    patch = SIDE // 8
    middle = shown[2 * patch + 8 : 3 * patch - 8, 5 * patch + 8 : 6 * patch - 8]
    assert middle.min() > shown[4 * patch :].max() + 40
    assert one.low == 0


@pytest.mark.parametrize(("count", "places"), [(1, [0]), (2, [0, 1]), (6, [0, 2, 5]), (24, [0, 11, 23])])
def test_shallow_middle_and_deep_layers_are_shown(count, places):
    assert shown_places(count) == places  # of COMM's 24 layers of CLIP: 1, 12 and 24, as in Figure 1


# HTML


def visible(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", html))


def test_what_people_and_models_say_is_text_and_never_markup(visitor, saying):
    visitor.pick(0)
    saying("<script>alert(1)</script> [0,0,0.5,0.5]")
    list(visitor.ask("<img src=x onerror=alert(1)> in [2,2,8,8]?"))
    html = markup.dialogue(visitor.about) + markup.beside(visitor.about.answers[0], "<b>", Answer("<i>", ("<i>",)))
    html += markup.suggestions(['"><b>'])
    assert not re.search(r"<(script|img|b|i)\b", html)
    assert "<img src=x onerror=alert(1)> in [2,2,8,8]?" in visible(html)
    assert "[0,0,32,32]" in visible(html)


def test_the_two_answers_are_compared(saying):
    first, same = Answer("a", ("a",)), Answer("a", ("a",))
    one, other = (Answer(str(box), ((box,),)) for box in ((0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 10.0, 10.0)))
    assert "the same" in visible(markup.beside(first, "clip", same))
    assert "overlap by 0.50" in visible(markup.beside(one, "clip", other))
    assert "has changed" in visible(markup.beside(first, "clip", one))


def test_bars_are_as_high_as_the_weights(answerer):
    html = markup.layer_weights({"clip": {1: 0.2, 2: 0.4, 12: 0.1}, "mean": {}})
    assert re.findall(r"height:([\d.]+)%", html) == ["50.0", "100.0", "25.0"]
    assert "--even:83.3%" in html  # a third, of 0.4
    assert "no weights" in html
    assert markup.layer_weights(answerer.model.model.vision_tower.layer_weights()).count('class="bar"') == 8 + 4


def test_pictures_stand_inside_the_page(visitor):
    visitor.pick(0)
    html = markup.maps(visitor.maps()) + markup.thumbnails([visitor.picture()], 7)
    assert len(re.findall(r'src="data:image/png;base64,', html)) == 8 + 1
    assert not re.search(r"https?://", html)
    assert html.count("alt=") == 9
    assert 'data-index="7"' in html
    assert markup.maps([]) == f'<p class="soft">{markup.NO_POINT}</p>'
    with Image.open(io.BytesIO(base64.b64decode(visitor.picture().partition(",")[2]))) as picture:
        assert picture.size == (64, 64)
