"""Boxes: Shikra's text against its golden file, and there and back again."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from commvlm.data.boxes import PadSquare, boxes_in_pixels, format_boxes, parse_boxes

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"
SHIKRA = re.compile(r"\[\d(?:\.\d*)?(?:,\d(?:\.\d*)?){3}(?:;\d(?:\.\d*)?(?:,\d(?:\.\d*)?){3})*\]")
"""Shikra's own pattern."""


@st.composite
def placed(draw):
    """An image's size and boxes inside it."""
    width, height = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    share = st.floats(0, 1, allow_nan=False)
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        x1, x2 = sorted((draw(share) * width, draw(share) * width))
        y1, y2 = sorted((draw(share) * height, draw(share) * height))
        boxes.append((x1, y1, x2, y2))
    return PadSquare(width, height), boxes


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the reference samples are not beside the project")
def test_golden_texts_of_shikra():
    cases = json.loads((SAMPLES / "shikra" / "box_text_golden.json").read_text())
    assert len(cases) == 6
    for case in cases:
        geometry = PadSquare(case["width"], case["height"])
        assert format_boxes([tuple(case["box_xyxy"])], geometry) == case["text"], case["name"]
        assert [round(v, 3) for v in geometry.forward(tuple(case["box_xyxy"]))] == case["normalised"]


def test_golden_text_written_out():
    box = (334.72, 298.08, 522.88, 450.23999999999995)
    assert format_boxes([box], PadSquare(640, 480)) == "[0.523,0.591,0.817,0.829]"
    both = format_boxes([box, (0, 0, 640, 480)], PadSquare(640, 480))
    assert both == "[0.523,0.591,0.817,0.829;0.000,0.125,1.000,0.875]"
    assert format_boxes([(0, 0, 101, 50)], PadSquare(101, 50)) == "[0.000,0.248,1.000,0.743]"  # padded by 25, then 26
    assert PadSquare(50, 101).offset == (25, 0)


@given(placed())
def test_there_and_back_within_half_a_quantum(case):
    geometry, boxes = case
    (group,) = boxes_in_pixels(format_boxes(boxes, geometry), geometry)
    assert len(group) == len(boxes)
    for back, box in zip(group, boxes, strict=True):
        for value, original in zip(back, box, strict=True):
            assert abs(value - original) <= 0.0005 * geometry.side * (1 + 1e-9)


@given(placed())
def test_inverse_undoes_forward(case):
    geometry, boxes = case
    for box in boxes:
        assert geometry.inverse(geometry.forward(box)) == pytest.approx(box, abs=1e-6)


@given(placed())
def test_written_boxes_are_what_shikra_reads(case):
    geometry, boxes = case
    text = format_boxes(boxes, geometry)
    assert SHIKRA.fullmatch(text)
    assert parse_boxes(f"it is at {text}, see?") == [
        tuple(tuple(float(v) for v in box.split(",")) for box in text[1:-1].split(";"))
    ]


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 3000), st.integers(1, 3000))
def test_inverse_stays_in_the_image(box, width, height):
    x1, y1, x2, y2 = PadSquare(width, height).inverse(tuple(box))
    assert 0 <= x1 <= width
    assert 0 <= x2 <= width
    assert 0 <= y1 <= height
    assert 0 <= y2 <= height


@given(
    st.lists(
        st.one_of(
            st.text(alphabet="[]0123456789.,; x-", max_size=8),
            st.lists(st.decimals(0, 2, places=3).map(str), min_size=4, max_size=4).map(lambda v: f"[{','.join(v)}]"),
        ),
        max_size=8,
    ).map("".join)
)
@example("[0.1,0.2,0.3,0.4]x[0.5,0.5,1.2,1]")
def test_any_text_parses_into_normalised_quadruples(text):
    for group in parse_boxes(text):
        assert group
        for box in group:
            assert len(box) == 4
            assert all(0 <= v <= 1 for v in box)
    plain = [m.group(0) for m in SHIKRA.finditer(text) if not re.search(r"(?<![\d.])[2-9]|1\.\d*[1-9]", m.group(0))]
    if plain:  # whatever Shikra reads, within [0, 1], is read
        assert len(parse_boxes(text)) >= len(plain)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("", []),
        ("no boxes", []),
        ("[0.1,0.2,0.3]", []),
        ("[0.1,0.2,0.3,0.4,0.5]", []),
        ("[0.1,0.2,0.3,1.4]", []),
        ("[0.1,0.2,0.3,-0.4]", []),
        ("[0.1,0.2,0.3,nan]", []),
        ("[٠.1,0.2,0.3,0.4]", []),
        ("[0.1,0.2,0.3,0.4", []),
        ("[0.1,0.2,0.3,0.4;]", []),
        ("[0.1, 0.2, 0.3, 0.4]", [((0.1, 0.2, 0.3, 0.4),)]),
        ("[0,0,1,1]", [((0, 0, 1, 1),)]),
        ("[0.9,0.2,0.3,0.4]", [((0.9, 0.2, 0.3, 0.4),)]),  # swapped stays swapped
        ("a [0.1,0.2,0.3,0.4] b [0,0,1,1;0,0,0.5,0.5]", [((0.1, 0.2, 0.3, 0.4),), ((0, 0, 1, 1), (0, 0, 0.5, 0.5))]),
    ],
)
def test_parsing(text, groups):
    assert parse_boxes(text) == groups


def test_long_hostile_text_is_read_quickly():
    assert parse_boxes("[" + "0.1,0.2,0.3,0.4;" * 20_000) == []
    assert parse_boxes("[0" + " " * 50_000) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_boxes_that_are_not_finite(value):
    with pytest.raises(ValueError, match="not finite"):
        format_boxes([(0.0, value, 1.0, 1.0)], PadSquare(10, 10))


def test_nothing_to_format():
    with pytest.raises(ValueError, match="empty"):
        format_boxes([], PadSquare(10, 10))
    with pytest.raises(ValueError, match="0 x 10"):
        PadSquare(0, 10)
