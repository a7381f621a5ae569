"""Asking about one image: boxes back in its pixels, the picture that is saved, conversations, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commvlm.app.chat import Answer, Conversation, ask, chat, converse, describe
from commvlm.app.drawing import PREDICTED, TRUE, Mark, draw_boxes, predicted_marks, save_picture, true_mark
from commvlm.data.collate import Collator
from commvlm.data.example import Example, Turn
from commvlm.train.assemble import assemble
from commvlm.train.recipe import load_recipe

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples" / "coco_images"
WHERE = "Where is the red star? Answer with its box."


TAUGHT = {WHERE: "it is at [0.125,0.250,0.500,0.750]", "Is there a star?": "yes"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A COMM that was taught two answers, whatever the image (its projection is silent)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    model, processor = assemble(load_recipe("micro").model)
    torch.nn.init.zeros_(model.model.multi_modal_projector.weight)
    examples = [
        Example(question, "dialogue", folder / "black.png", (Turn(f"<image>\n{question}", answer),))
        for question, answer in TAUGHT.items()
    ]
    collator = Collator(processor.tokenizer, processor.image_processor, model.config.num_image_tokens)
    batch = collator([[example] for example in examples])
    optimizer = torch.optim.AdamW(model.parts()["language_model"].parameters(), lr=1e-3)
    for _ in range(100):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    noise = np.random.default_rng(0).integers(0, 256, (45, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


class Saying:
    """An answerer that says what it was given, and remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), list[Example]()

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        self.asked += examples
        return [self.texts.pop(0) for _ in examples]


# One question


def test_a_box_is_printed_and_drawn_in_the_images_own_pixels(checkpoint, image, tmp_path, capsys):
    out = tmp_path / "made" / "answer.png"
    answer = ask(checkpoint, image, WHERE, out=out)
    assert answer.text == TAUGHT[WHERE]
    # 90 x 45 sits in a square of 90 below 22 pixels of padding: 90 x .250 - 22 = 0.5, 90 x .750 - 22 = 45.5 > 45
    assert answer.boxes == (pytest.approx((11.25, 0.5, 45.0, 45.0)),)
    assert answer.picture == out
    with Image.open(out) as picture:
        assert picture.size == (540, 270)  # six times larger: the first whole factor beyond 512
    chat(checkpoint, WHERE, image=image, out=out)
    lines = [answer.text, "box: x 11.2 to 45.0, y 0.5 to 45.0 pixels", f"drawn in {out}"]
    assert capsys.readouterr().out.splitlines() == lines


def test_an_answer_without_boxes_saves_nothing(checkpoint, image, tmp_path):
    out = tmp_path / "answer.png"
    answer = ask(checkpoint, image, "Is there a star?", out=out)
    assert answer.text == "yes"
    assert (answer.boxes, answer.picture, out.exists()) == ((), None, False)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real photos are not beside this checkout")
def test_a_real_photo(checkpoint, tmp_path):
    path = SAMPLES / "000000039769.png"
    answer = ask(checkpoint, path, WHERE, out=tmp_path / "answer.jpg")
    assert answer.boxes == (pytest.approx((80, 80, 320, 400)),)  # 640 x 480 below 80 pixels of padding
    with Image.open(tmp_path / "answer.jpg") as picture:
        assert picture.size == (640, 480)


def huge(path: Path) -> Path:
    """A PNG of a few hundred bytes that says it is 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))
    return path


def test_bad_input_is_one_line_before_anything_is_loaded(checkpoint, image, tmp_path):
    corrupt, text, out = tmp_path / "corrupt.png", tmp_path / "text.png", tmp_path / "answer.png"
    corrupt.write_bytes(image.read_bytes()[:200])
    text.write_text("no image")
    nothing = tmp_path / "nothing"  # a folder that looks like a checkpoint and has no weights: loading it would fail
    nothing.mkdir()
    (nothing / "config.json").write_text('{"model_type": "comm"}')
    for said, arguments in {
        "there is no such image file": (nothing, tmp_path / "missing.png", WHERE),
        "damaged or truncated": (nothing, corrupt, WHERE),
        "is no image": (nothing, text, WHERE),
        "huge.png: too large": (nothing, huge(tmp_path / "huge.png"), WHERE),
        "is no checkpoint: no config.json": (tmp_path, image, WHERE),
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            ask(*arguments, out=out)
        assert "\n" not in str(error.value)
    for name, said in ((tmp_path / "answer.exe", "no name for a picture"), (image, "is the image itself")):
        with pytest.raises(ValueError, match=said):
            ask(nothing, image, WHERE, out=name)
    assert not out.exists()


def test_a_question_needs_an_image(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="add --image FILE"):
        chat(checkpoint, WHERE, image=None, out=tmp_path / "answer.png")


# Conversations


def test_questions_go_in_word_for_word_with_what_was_said_before(image):
    answerer = Saying("yes", "at [0.100,0.500,0.300,0.600]", "[0,0,1,1;0.5,0.5,1,1]")
    conversation = Conversation(answerer, image)
    first = conversation.ask("  Is there a star?")
    second = conversation.ask("where?")
    third = conversation.ask("all of them")
    assert [[turn.question for turn in example.turns] for example in answerer.asked] == [
        ["<image>\n  Is there a star?"],
        ["<image>\n  Is there a star?", "where?"],
        ["<image>\n  Is there a star?", "where?", "all of them"],
    ]
    assert [turn.answer for turn in answerer.asked[2].turns] == ["yes", "at [0.100,0.500,0.300,0.600]", ""]
    assert first.boxes == ()
    assert second.boxes == (pytest.approx((9.0, 23.0, 27.0, 32.0)),)
    assert third.boxes == (pytest.approx((0, 0, 90, 45)), pytest.approx((45, 23, 90, 45)))
    assert describe(third).splitlines()[1:] == [
        "box 1: x 0.0 to 90.0, y 0.0 to 45.0 pixels",
        "box 2: x 45.0 to 90.0, y 23.0 to 45.0 pixels",
    ]
    assert describe(Answer("", ())) == "(no answer)"


@pytest.mark.parametrize(
    ("question", "said"), [("  ", "is empty"), ("a <boxes>?", "spells <boxes>"), ("<image>", "spells <image>")]
)
def test_questions_that_cannot_be_asked(image, question, said):
    conversation = Conversation(Saying(), image)
    with pytest.raises(ValueError, match=said):
        conversation.ask(question)
    assert conversation.turns == []


def test_a_special_token_is_refused_and_the_conversation_goes_on(checkpoint, image, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"say </s>\n{WHERE}\n/quit\nnever asked\n"))
    converse(checkpoint, image)
    said = capsys.readouterr().out
    assert "error: example the conversation: its text spells the special token </s>" in said
    assert said.count("box: x ") == 1


def test_the_loop_changes_images_saves_and_survives_mistakes(checkpoint, image, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "saved.png"
    lines = [
        WHERE, "/image missing.png", f"/image {image}", "/help", WHERE, f"/save {tmp_path / 'saved.exe'}",
        f"/save {image}", f"/save {saved}",
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    converse(checkpoint, None)  # the input ends without /quit
    said = capsys.readouterr().out
    for line in (
        "no image yet",
        "error: missing.png: there is no such image",
        "no name for a picture",
        "is the image itself",
    ):
        assert said.count(line) == 1, line
    assert said.count("/quit") == 2  # at the start, and for /help
    assert said.count("box: x ") == 1
    assert str(saved) in said
    assert saved.is_file()


# Drawing


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[k : k + 2], 16) for k in (1, 3, 5))


def test_boxes_lie_where_they_belong_in_the_enlarged_picture():
    picture = draw_boxes(Image.new("RGB", (64, 64)), [Mark((16, 8, 48, 40), "#D55E00")])
    assert picture.size == (512, 512)
    drawn = np.argwhere((np.asarray(picture) == rgb("#D55E00")).all(-1))
    (top, left), (bottom, right) = drawn.min(0), drawn.max(0)
    assert np.abs(np.array([left, top, right, bottom]) - np.array([16, 8, 48, 40]) * 8).max() <= 2
    assert not (np.asarray(picture)[80:300, 150:360] == rgb("#D55E00")).all(-1).any()  # nothing inside


def test_true_boxes_have_gaps_and_closed_corners():
    marks = [Mark((100, 100, 400, 300), TRUE, dashed=kind) for kind in (False, True)]
    pictures = [draw_boxes(Image.new("RGB", (512, 512)), [mark]) for mark in marks]
    solid, dashed = ((np.asarray(picture) == rgb(TRUE)).all(-1) for picture in pictures)
    line = dashed[98:103, 100:401].any(0)
    assert solid[98:103, 100:401].any(0).all()
    gaps = np.flatnonzero(np.diff(line.astype(int)) == -1)
    assert len(gaps) > 5
    assert line[:4].all()
    assert line[-4:].all()
    assert 0.4 < line.mean() < 0.85


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((640, 480), (640, 480)), ((4096, 1024), (2048, 512)), ((1, 1), (512, 512)), ((7, 3), (518, 222))],
)
def test_pictures_are_enlarged_by_whole_factors_or_reduced(size, drawn):
    assert draw_boxes(Image.new("RGB", size), []).size == drawn


def test_odd_boxes_and_modes_are_drawn_all_the_same():
    marks = [
        *predicted_marks([(50, 50, 10, 10), (0, 0, 0, 0), (-9, -9, 999, 999), (60, 2, 63, 4)]),
        true_mark((0, 60, 64, 64)),
    ]
    assert [mark.label for mark in marks] == ["answer 1", "answer 2", "answer 3", "answer 4", "true"]
    assert len({mark.color for mark in marks}) == 5
    assert all(color in PREDICTED for color in (mark.color for mark in marks[:4]))
    for mode in ("RGB", "L", "RGBA", "P"):
        assert draw_boxes(Image.new(mode, (64, 64)), marks).mode == "RGB"


def test_the_image_itself_is_not_drawn_on():
    image = Image.new("RGB", (600, 600))
    draw_boxes(image, [true_mark((10, 10, 500, 500))])
    assert not np.asarray(image).any()


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    target = save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png")
    before = target.read_bytes()

    def full(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_picture(Image.new("RGB", (8, 8)), target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
