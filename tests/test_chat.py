"""Asking about one image: boxes back in its pixels, the picture that is saved, conversations, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_drawing import rgb

from commvlm.app.answering import Answerer
from commvlm.app.chat import Talk, ask, chat, described
from commvlm.app.conversation import Answer, Conversation, history_of, pieces_of, question_of, typed
from commvlm.app.drawing import ASKED
from commvlm.data.boxes import PadSquare
from commvlm.data.collate import Collator
from commvlm.data.example import Example, Turn
from commvlm.train.assemble import assemble
from commvlm.train.recipe import as_yaml, load_recipe

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
    """Says what it was given, a character more each time, and remembers what it was asked, and without which parts."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked, self.off = list(texts), list[Example](), list[str | None]()

    def stream(self, example: Example, *, knock_out: str | None = None) -> Iterator[str]:
        self.asked.append(example)
        self.off.append(knock_out)
        text = self.texts.pop(0)
        yield from (text[:end] for end in range(1, len(text) + 1))

    def view(self, width: int, height: int) -> PadSquare:
        return PadSquare(width, height)


# One question


def test_a_box_is_printed_and_drawn_in_the_images_own_pixels(checkpoint, image, tmp_path, capsys):
    out = tmp_path / "made" / "answer.png"
    answer = ask(checkpoint, image, WHERE, out=out)
    assert answer.text == TAUGHT[WHERE]
    # 90 x 45 sits in a square of 90 below 22 pixels of padding: 90 x .250 - 22 = 0.5, 90 x .750 - 22 = 45.5 > 45
    assert answer.boxes == (pytest.approx((11.25, 0.5, 45.0, 45.0)),)
    with Image.open(out) as picture:
        assert picture.size == (540, 270)  # six times larger: the first whole factor beyond 512
    chat(checkpoint, WHERE, image=image, out=out)
    lines = ["it is at [11.2,0.5,45,45]", f"drawn in {out}"]
    assert capsys.readouterr().out.splitlines() == lines


def test_an_answer_without_boxes_saves_nothing(checkpoint, image, tmp_path):
    out = tmp_path / "answer.png"
    answer = ask(checkpoint, image, "Is there a star?", out=out)
    assert answer.text == "yes"
    assert (answer.boxes, out.exists()) == ((), False)


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
    assert described(third) == "[0,0,90,45;45,23,90,45]"
    assert described(Answer("")) == "(no answer)"


def test_history_bounds_what_goes_along(image):
    answerer = Saying("a", "b", "c", "d")
    conversation = Conversation(answerer, image, history=1)
    for question in ("one", "two", "three"):
        conversation.ask(question)
    conversation.history = 0
    conversation.ask("four")
    assert [[turn.question for turn in example.turns] for example in answerer.asked] == [
        ["<image>\none"], ["<image>\none", "two"], ["<image>\ntwo", "three"], ["<image>\nfour"],
    ]  # fmt: skip
    assert len(conversation.turns) == len(conversation.answers) == 4


def test_brackets_stream_whole_and_the_turn_is_kept_when_all_is_said(image):
    conversation = Conversation(Saying("at [0.100,0.500,0.300,0.600] or [so"), image)
    shown = []
    for answer in conversation.stream("where?"):
        shown.append(answer.shown)
        assert conversation.turns == []
    assert shown[0] == "a"
    assert not any("[" in text and "]" not in text for text in shown[:-1])
    assert shown[-1] == "at [9,23,27,32] or [so"
    assert len(conversation.turns) == 1


def test_a_question_again_without_a_part_is_not_remembered(image):
    answerer = Saying("yes", "a", "no")
    conversation = Conversation(answerer, image)
    with pytest.raises(ValueError, match="nothing has been asked"):
        conversation.again("clip")
    conversation.ask("one")
    conversation.ask("in [1,2,3,4]?")
    *_, other = conversation.again("clip:1")
    assert (other.text, answerer.off) == ("no", [None, None, "clip:1"])
    assert answerer.asked[2] == answerer.asked[1]
    assert [answer.text for answer in conversation.answers] == ["yes", "a"]


# Boxes and points in the question


def test_boxes_and_points_go_in_as_pixels():
    turn = typed("Is [10, 20,30.5,40] or [1,2,3,4;0,0,90,45] at [5,6]?  [a,b] [7] [0.125,0.250,0.500,0.750]", (90, 45))
    assert turn.question == "Is <boxes> or <boxes> at <points>?  [a,b] [7] [0.125,0.250,0.500,0.750]"
    assert turn.question_boxes == (((10, 20, 30.5, 40),), ((1, 2, 3, 4), (0, 0, 90, 45)))
    assert turn.question_points == (((5, 6),),)
    assert question_of(turn).startswith("Is [10,20,30.5,40] or [1,2,3,4;0,0,90,45] at [5,6]?")


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("[10,20,91,40]", "does not lie in the image, which is 90 pixels wide and 45 high"),
        ("[10,20,20,46]", "does not lie in the image"),
        ("[-1,0,5,5]", "does not lie in the image"),
        ("[30,20,10,40]", "holds nothing"),
        ("[1,2,3]", "neither a box"),
        ("[1,2;1,2,3,4]", "neither a box"),
    ],
)
def test_boxes_that_are_none_are_refused(question, said):
    with pytest.raises(ValueError, match=said):
        typed(f"what is in {question}?", (90, 45))


def test_a_typed_box_reaches_the_model_in_its_own_numbers(checkpoint, image, monkeypatch, capsys):
    seen = []
    encode = Collator.prompts
    monkeypatch.setattr(Collator, "prompts", lambda self, *given: seen.append(encode(self, *given)) or seen[-1])
    chat(checkpoint, "what is in [9,23,27,32]?", image=image, out=image.with_name("out.png"), max_new_tokens=1)
    text = Answerer(checkpoint).processor.tokenizer.decode(seen[0][0])
    assert "what is in [0.100,0.500,0.300,0.600]?" in text  # 22 pixels of padding above, a square of 90


def test_pieces_of_an_answer():
    view = PadSquare(100, 50)
    assert pieces_of("a [0.100,0.500,0.300,0.600] b [0.500,0.500] [x]", view) == (
        "a ", ((10.0, 25.0, 30.0, 35.0),), " b ", ((50.0, 25.0),), " [x]",
    )  # fmt: skip
    assert pieces_of("", view) == ()


def test_a_run_of_single_questions_is_asked_without_history(world, tmp_path):
    recipe = load_recipe("micro", ["--data.root", str(world)])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "comm"}')
    assert history_of(tmp_path / "model") is None
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    (tmp_path / "run.json").write_text(json.dumps({"model": "model"}))
    assert history_of(tmp_path / "model") == 0


@pytest.mark.parametrize(
    ("question", "said"), [("  ", "is empty"), ("a <boxes>?", "spells <boxes>"), ("<image>", "spells <image>")]
)
def test_questions_that_cannot_be_asked(image, question, said):
    conversation = Conversation(Saying(), image)
    with pytest.raises(ValueError, match=said):
        conversation.ask(question)
    assert conversation.turns == []


def typed_in(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))


def test_a_special_token_is_refused_and_the_conversation_goes_on(checkpoint, image, monkeypatch, capsys):
    typed_in(monkeypatch, "say </s>", WHERE, "/quit", "never asked")
    chat(checkpoint, None, image=image, out=image.with_name("out.png"))
    said = capsys.readouterr().out
    assert "error: example the conversation: its text spells the special token </s>" in said
    assert said.count("it is at [11.2,0.5,45,45]") == 1
    assert "never asked" not in said


def test_the_loop_changes_images_saves_and_survives_mistakes(image, tmp_path, monkeypatch, capsys):
    out, saved = tmp_path / "out.png", tmp_path / "saved.png"
    talk = Talk(Saying(TAUGHT[WHERE], "", "it is [0,0,1,1]"), out)
    typed_in(
        monkeypatch, WHERE, "/history", "/image missing.png", "/image ~nobody-here/a.png",
        "/image", f'/image "{image}"', "/help", "/nothing",
        "is it in [1,2,30,40]?", "or in [1,2,300,40]?", "/history", "/new", "/history", "and now?", "is there a star?",
        f"/save {tmp_path / 'saved.exe'}", f"/save {image}", f"/save {saved}",
    )  # fmt: skip
    talk.converse()  # the input ends without /quit
    said = capsys.readouterr().out
    for line in (
        "error: missing.png: there is no such image",
        "error: Could not determine home directory",
        "error: no file is named",
        "scene.png: 90 x 45 pixels",
        "error: there is no /nothing; commands: /image",
        "error: [1,2,300,40] does not lie in the image",
        "(no answer)",
        "error: " + str(tmp_path / "saved.exe"),
        "is the image itself",
        f"drawn in {saved}",
    ):
        assert said.count(line) == 1, line
    assert said.count("no image yet") == 2
    assert said.count("> is it in [1,2,30,40]?\nit is at [11.2,0.5,45,45]") == 1
    assert said.count("what was said so far") == 1
    assert said.count(f"drawn in {out}") == 2
    with Image.open(out) as picture:
        assert rgb(ASKED) not in {color for _, color in picture.getcolors(2**20)}  # the last answer had no box asked


def test_an_interrupted_answer_is_not_remembered(image, tmp_path, monkeypatch, capsys):
    class Interrupted(Saying):
        def stream(self, example: Example, *, knock_out: str | None = None) -> Iterator[str]:
            yield "half an"
            raise KeyboardInterrupt

    talk = Talk(Interrupted(), tmp_path / "out.png")
    talk.open(image)
    typed_in(monkeypatch, "what?", "/history")
    talk.converse()
    assert "half an" in capsys.readouterr().out
    assert talk.conversation is not None
    assert talk.conversation.turns == []
