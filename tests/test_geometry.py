"""Views: pixels, boxes and text, there and back, for any image; the model's pictures show what the views say."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from commvlm.data.boxes import (
    CODECS,
    box_iou,
    boxes_in_pixels,
    codec_of,
    format_boxes,
    format_points,
    parse_boxes,
    parse_points,
    points_in_pixels,
)  # fmt: skip
from commvlm.data.geometry import GEOMETRIES, PadSquare, View
from commvlm.model.config import GEOMETRIES as SHOWN
from commvlm.model.processing import CommImageProcessor

SHARE = st.floats(0, 1, allow_nan=False)


@st.composite
def views(draw):
    """A view of any kind, windows of windows among them, and boxes that lie in both its image and its window."""
    width, height = draw(st.integers(1, 4000)), draw(st.integers(1, 4000))
    view = GEOMETRIES[draw(st.sampled_from(sorted(GEOMETRIES)))](width, height)
    for _ in range(draw(st.integers(0, 2))):
        x1, y1, x2, y2 = view.window
        how = draw(st.sampled_from(["crop", "tiles", "pad", "center"]))
        if how == "crop" and x2 - x1 > 4 and y2 - y1 > 4:
            left, top = x1 + draw(SHARE) * (x2 - x1) / 2, y1 + draw(SHARE) * (y2 - y1) / 2
            view = view.crop((left, top, (left + x2) / 2, (top + y2) / 2))
        elif how == "tiles":
            tiles = view.tiles(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
            view = draw(st.sampled_from(tiles))
        elif how == "pad":
            view = view.pad_square()
        elif how == "center":
            view = view.center_crop()
    left, top = max(view.window[0], 0), max(view.window[1], 0)
    right, bottom = min(view.window[2], width), min(view.window[3], height)
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        xs = sorted(left + draw(SHARE) * max(right - left, 0) for _ in range(2))
        ys = sorted(top + draw(SHARE) * max(bottom - top, 0) for _ in range(2))
        boxes.append((xs[0], ys[0], xs[1], ys[1]))
    return view, boxes if right > left and bottom > top else []


@given(views())
def test_inverse_undoes_forward(case):
    view, boxes = case
    for box in boxes:
        assert view.inverse(view.forward(box)) == pytest.approx(box, abs=1e-6)
        assert view.inverse_point(view.forward_point(box[:2])) == pytest.approx(box[:2], abs=1e-6)


@given(views(), st.sampled_from(sorted(CODECS)))
def test_text_comes_back_within_half_a_quantum(case, name):
    """Whatever the view, the codec and the number of boxes and points in a slot."""
    view, boxes = case
    codec = codec_of(name)
    if not boxes:
        return
    steps = codec.quantum(view)
    text = f"a {format_boxes(boxes, view, codec)} b {format_points([box[2:] for box in boxes], view, codec)}"
    (group,) = boxes_in_pixels(text, view, codec)
    (points,) = points_in_pixels(text, view, codec)
    for back, box in zip(group, boxes, strict=True):
        for k in range(4):
            assert abs(back[k] - box[k]) <= steps[k % 2] / 2 * (1 + 1e-9) + 1e-9
    for point, box in zip(points, boxes, strict=True):
        for k in range(2):
            assert abs(point[k] - box[2 + k]) <= steps[k] / 2 * (1 + 1e-9) + 1e-9


@given(views())
def test_pad_and_crop_keep_the_middle(case):
    view, _ = case
    for squared in (view.pad_square(), view.center_crop()):
        width, height = squared.size
        assert width == pytest.approx(height)
        for axis in (0, 1):
            middles = [(v.window[axis] + v.window[axis + 2]) / 2 for v in (view, squared)]
            assert abs(middles[0] - middles[1]) < 1  # the smaller half of the padding is floored to a whole pixel
    assert view.pad_square().size[0] == pytest.approx(max(view.size))
    assert view.center_crop().size[0] == pytest.approx(min(view.size))


@given(views(), st.integers(1, 4), st.integers(1, 4))
def test_tiles_share_out_every_box(case, columns, rows):
    view, boxes = case
    tiles = view.tiles(columns, rows)
    assert len(tiles) == columns * rows
    for box in boxes:
        if (box[2] - box[0]) * (box[3] - box[1]) > 1e-3:
            assert sum(tile.shows(box) for tile in tiles) == pytest.approx(view.shows(box), abs=1e-6)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_pad_square_is_the_view_of_that_name(width, height):
    square = PadSquare(width, height)
    assert View.whole(width, height).pad_square().window == square.window
    assert pickle.loads(pickle.dumps(square)) == square
    assert square.window[0] == -square.offset[0]
    assert square.size == (square.side, square.side)


def test_written_out_by_hand():
    view = View.whole(200, 100)
    box = (50, 20, 150, 60)
    assert view.forward(box) == (0.25, 0.2, 0.75, 0.6)
    assert view.pad_square().forward(box) == (0.25, 0.35, 0.75, 0.55)  # 50 pixels above, side 200
    assert view.center_crop().forward(box) == (0.0, 0.2, 1.0, 0.6)  # window 50..150
    assert view.tiles(2, 1)[1].forward(box) == (0.0, 0.2, 0.5, 0.6)
    assert view.tiles(2, 1)[1].shows(box) == 0.5
    assert view.crop((50, 0, 100, 100)).pad_square().forward((50, 0, 100, 50)) == (0.25, 0.0, 0.75, 0.5)
    assert [format_boxes([box], view, codec) for codec in CODECS.values()] == [
        "[0.250,0.200,0.750,0.600]", "[250,200,749,599]", "[250,200,750,600]", "[50,20,150,60]",
    ]  # fmt: skip
    assert format_points([(100, 50), (0, 0)], view) == "[0.500,0.500;0.000,0.000]"


def test_points_and_boxes_are_told_apart():
    text = "[0.1,0.2] [0.1,0.2,0.3,0.4] [0.1,0.2;0.3,0.4] [0.1]"
    assert parse_points(text) == [((0.1, 0.2),), ((0.1, 0.2), (0.3, 0.4))]
    assert parse_points("(58,116),(300,400)", codec_of("0-1000")) == []
    assert parse_boxes(text) == [((0.1, 0.2, 0.3, 0.4),)]


QWEN = "<|object_ref_start|>the cup<|object_ref_end|><|box_start|>(58,116),(300,400)<|box_end|><|im_end|>"
"""As Qwen2-VL answers."""


@pytest.mark.parametrize(
    ("name", "text", "groups"),
    [
        ("0-999", "[0,0,999,999]", [((0, 0, 1, 1),)]),
        ("0-999", "[0,0,999,1000]", []),
        ("0-1000", "[0,0,999,1000]", [((0, 0, 0.999, 1),)]),
        ("0-1000", "[0, 0, 10001, 5]", []),
        ("0-1000", "[[058,116,300,400]]", [((0.058, 0.116, 0.3, 0.4),)]),
        ("0-1000", QWEN, [((0.058, 0.116, 0.3, 0.4),)]),
        ("0-1000", "(58, 116), (300, 400)", [((0.058, 0.116, 0.3, 0.4),)]),
        (
            "0-999",
            f"{QWEN} or [0,0,999,999] or (0,0),(999,999)",
            [
                ((58 / 999, 116 / 999, 300 / 999, 400 / 999),),
                ((0, 0, 1, 1),),
                ((0, 0, 1, 1),),
            ],
        ),
        ("0-1000", "(58,116),(300,1001) (58,116)", []),
        ("pixels", QWEN, []),
        ("shikra3", "(0.1,0.2),(0.3,0.4)", []),
        ("pixels", "[0,0,1024,77.5]", [((0, 0, 1024, 77.5),)]),
        ("pixels", "[-1,0,3,4]", []),
        ("shikra3", "[0,0,999,999]", []),
    ],
)
def test_a_codec_reads_what_it_can_write(name, text, groups):
    assert parse_boxes(text, codec_of(name)) == groups


@given(
    st.lists(
        st.one_of(
            st.text(alphabet="[]()0123456789.,; -", max_size=8),
            st.lists(st.integers(0, 2000).map(str), min_size=4, max_size=4).map(lambda v: f"[{','.join(v)}]"),
            st.lists(st.integers(0, 1000).map(str), min_size=4, max_size=4).map(
                lambda v: f"({v[0]},{v[1]}),({v[2]},{v[3]})"
            ),
        ),
        max_size=6,
    ).map("".join),
    st.sampled_from(sorted(CODECS)),
)
@example("[10,20,1500,900]", "pixels")
def test_any_answer_parses_and_stays_in_the_image(text, name):
    view = PadSquare(40, 30)
    for group in boxes_in_pixels(text, view, codec_of(name)):
        for x1, y1, x2, y2 in group:
            assert 0 <= min(x1, x2) <= max(x1, x2) <= 40
            assert 0 <= min(y1, y2) <= max(y1, y2) <= 30


def test_refusals():
    with pytest.raises(ValueError, match="no box text '0-100'; codecs: shikra3"):
        codec_of("0-100")
    with pytest.raises(ValueError, match="leaves the view's window"):
        View.whole(10, 10).crop((5, 5, 11, 9))
    with pytest.raises(ValueError, match="shows nothing"):
        View(10, 10, (5, 5, 5, 9))
    with pytest.raises(ValueError, match="1 x 1 tiles, not 0 x 2"):
        View.whole(10, 10).tiles(0, 2)
    with pytest.raises(ValueError, match="not finite"):
        format_points([(float("nan"), 1)], PadSquare(10, 10))
    with pytest.raises(ValueError, match="a <points> slot"):
        format_points([], PadSquare(10, 10))


def test_the_models_config_knows_the_same_geometries():
    assert set(SHOWN) == set(GEOMETRIES)


@pytest.mark.parametrize("geometry", sorted(GEOMETRIES))
@pytest.mark.parametrize("size", [(64, 48), (40, 101), (33, 33), (301, 97)])
def test_the_models_pictures_show_what_the_views_say(geometry, size):
    """A red rectangle, found again in the encoder's pixels, lies where its box is written."""
    width, height = size
    box = (width // 2 - 6, height // 2 - 8, width // 2 + 9, height // 2 + 7)
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[box[1] : box[3], box[0] : box[2], 0] = 255
    side = 224
    encoders = [{"name": "a", "size": side, "mean": [0.0] * 3, "std": [1.0] * 3}]
    processor = CommImageProcessor(encoders=encoders, geometry=geometry, pad_color=(0, 255, 0))
    red = processor.row(Image.fromarray(picture)).reshape(3, side, side)[0] > 0.5
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    said = tuple(value * side for value in GEOMETRIES[geometry](width, height).forward(box))
    assert found == pytest.approx(said, abs=1.0)
    assert box_iou([found], [said])[0] > 0.9


def test_padding_has_any_colour():
    encoders = [{"name": "a", "size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}]
    for color in ((255, 255, 255), (122, 116, 104)):  # Shikra's white, CLIP's mean
        row = CommImageProcessor(encoders=encoders, pad_color=color).row(Image.new("RGB", (8, 4)))
        assert row.reshape(3, 8, 8)[:, 0, 0] * 255 == pytest.approx(color)
