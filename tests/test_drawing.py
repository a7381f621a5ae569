"""Pictures in the terminal, and boxes drawn on images."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commvlm.app.drawing import PREDICTED, TRUE, Mark, draw_boxes, predicted_marks, save_picture, true_mark
from commvlm.app.terminal import half_blocks, iterm, kitty, preview

# The terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_pictures_are_shown_by_what_the_terminal_can():
    picture = Image.new("RGB", (64, 32), "#102030")

    def shown(**environ: str) -> str:
        terminal = Terminal()
        assert preview(picture, file=terminal, environ=environ) == bool(terminal.getvalue())
        return terminal.getvalue()

    assert not preview(picture, file=io.StringIO(), environ={"TERM": "xterm-kitty"})
    for poor in ({}, {"TERM": "dumb"}, {"TERM": "xterm"}, {"TERM": "xterm-kitty", "NO_COLOR": "1"}):
        assert shown(**poor) == "", poor
    assert shown(TERM="xterm-kitty").startswith("\x1b_Ga=T,f=100,")
    assert shown(TERM="xterm-256color", TERM_PROGRAM="iTerm.app").startswith("\x1b]1337;File=inline=1;")
    blocks = shown(TERM="xterm-256color", COLORTERM="truecolor")
    assert "38;2;16;32;48;48;2;16;32;48m▀" in blocks  # both halves of every character
    assert len(blocks.strip().splitlines()) == 12  # 48 columns of 64 x 32 pixels, two rows a line


def test_the_messages_hold_the_picture():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b", kitty(noise, 30))
    assert len(parts) > 2
    assert all(len(data) <= 4096 for _, data in parts)
    assert [keys[-3:] for keys, _ in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]
    (inline,) = re.findall(r"File=[^:]*:([^\x07]*)\x07", iterm(noise, 30))
    for data in ("".join(data for _, data in parts), inline):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(noise))
    upper = half_blocks(noise.resize((4, 4)), 4).segments[0]
    assert upper.text == "▀"
    assert upper.style is not None


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
