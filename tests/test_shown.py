"""What a model is shown of an image: itself, grey, or another image in its place."""

import numpy as np
import pytest
from PIL import Image

from commvlm.data.collate import Collator
from commvlm.data.example import Example, Turn
from commvlm.data.images import OPENERS


@pytest.fixture
def folder(tmp_path):
    for k in range(5):
        Image.new("RGB", (10 + k, 20), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
    return tmp_path


def test_grey_keeps_the_size_and_nothing_else(folder):
    shown = OPENERS["grey"](folder / "3.png")
    assert shown.size == (13, 20)
    assert np.unique(np.asarray(shown)).tolist() == [128]


def test_shuffled_shows_every_image_once_and_none_in_its_own_place(folder):
    reds = []
    for k in range(5):
        shown = OPENERS["shuffled"](folder / f"{k}.png")
        assert shown.size == (10 + k, 20)
        reds.append(shown.getpixel((0, 0))[0] // 40)
    assert sorted(reds) == list(range(5))
    assert all(red != k for k, red in enumerate(reds))


def test_a_collator_shows_what_it_is_told(folder):
    example = Example("0", "vqa", folder / "3.png", (Turn("q?", "a"),))
    for kind in OPENERS:
        collator = Collator(None, None, 1, pixels=kind)  # type: ignore[arg-type]
        (shown,) = collator.opened([example]).values()
        assert np.array_equal(np.asarray(shown), np.asarray(OPENERS[kind](folder / "3.png")))


def test_shuffled_needs_another_image(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "only.png")
    with pytest.raises(ValueError, match=r"only\.png: its folder holds no other image"):
        OPENERS["shuffled"](tmp_path / "only.png")
