"""Box conventions are told from the numbers and the sizes, or refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commvlm.data.convention import CONVENTIONS, Unsure, convention_of, detect

SIZES = ((640, 480), (500, 375), (480, 640), (333, 500), (1024, 768))
DECIMALS = {"pixels": 0, "0-1": 3, "0-999": 0, "0-1000": 0}
TOP = {"0-1": 1, "0-999": 999, "0-1000": 1000}


def written(convention, boxes, sizes):
    """Corners in pixels -> the convention's numbers, by its definition, rounded as files are."""
    rows = []
    for (x1, y1, x2, y2), (width, height) in zip(boxes, sizes, strict=True):
        if convention.square:
            side = max(width, height)
            x1, x2 = ((x + (side - width) // 2) / side * TOP[convention.unit] for x in (x1, x2))
            y1, y2 = ((y + (side - height) // 2) / side * TOP[convention.unit] for y in (y1, y2))
        elif convention.unit != "pixels":
            x1, x2 = (x / width * TOP[convention.unit] for x in (x1, x2))
            y1, y2 = (y / height * TOP[convention.unit] for y in (y1, y2))
        row = {
            "xyxy": (x1, y1, x2, y2), "xywh": (x1, y1, x2 - x1, y2 - y1),
            "cxcywh": ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1),
        }[convention.layout]  # fmt: skip
        rows.append([round(value, DECIMALS[convention.unit]) for value in row])
    return rows


def scattered(count, seed, sizes=SIZES):
    rng = np.random.default_rng(seed)
    used = [sizes[k % len(sizes)] for k in range(count)]
    boxes = []
    for width, height in used:
        w, h = rng.uniform(0.05, 0.95, 2) * (width, height)
        x, y = rng.random(2) * (width - w, height - h)
        boxes.append((x, y, x + w, y + h))
    return boxes, used


@pytest.mark.parametrize("count", [5, 40, 200, 3000])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_never_a_wrong_convention(name, count):
    """It may refuse; it may not be wrong. What is refused names the true one among those that are left."""
    boxes, sizes = scattered(count, seed=count)
    try:
        told = [detect(written(CONVENTIONS[name], boxes, sizes), sizes).convention.name]
    except Unsure as unsure:
        told = [e.name for e in unsure.evidence if e.behind < 15]
        assert len(told) > 1
    assert name in told


@pytest.mark.parametrize("name", [n for n, c in CONVENTIONS.items() if c.unit in ("pixels", "0-1")])
def test_forty_boxes_are_enough_for_pixels_and_shares(name):
    boxes, sizes = scattered(40, seed=1)
    verdict = detect(written(CONVENTIONS[name], boxes, sizes), sizes)
    assert verdict.convention.name == name
    assert verdict.evidence[0].outside == 0
    assert verdict.evidence[1].behind > 7


def test_thousandths_are_told_by_a_thousand():
    boxes, sizes = scattered(300, seed=2)
    boxes[7] = (0, 0, *sizes[7])
    verdict = detect(written(CONVENTIONS["xyxy-0-1000"], boxes, sizes), sizes)
    assert verdict.convention.name == "xyxy-0-1000"
    rows = zip(written(CONVENTIONS["xyxy-0-1000"], boxes, sizes), sizes, strict=True)
    short = [(row, size) for row, size in rows if max(row) < 1000]
    with pytest.raises(Unsure, match=r"xyxy-0-999 and xyxy-0-1000.*cannot be told apart"):
        detect([row for row, _ in short], [size for _, size in short])


def test_a_few_slips_do_not_matter_and_many_are_refused():
    boxes, sizes = scattered(100, seed=3)
    rows = written(CONVENTIONS["xywh-pixels"], boxes, sizes)
    rows[5] = [600, 400, 500, 500]
    verdict = detect(rows, sizes)
    assert verdict.convention.name == "xywh-pixels"
    assert verdict.evidence[0].outside == 0.01
    assert verdict.evidence[0].example == 5
    rng = np.random.default_rng(0)
    with pytest.raises(Unsure, match=r"no convention fits: under the best"):
        detect(rng.uniform(-2000, 3000, (50, 4)).tolist(), sizes[:50])


def test_square_images_cannot_tell_padded_from_not():
    boxes, sizes = scattered(100, seed=4, sizes=((300, 300), (512, 512)))
    with pytest.raises(Unsure, match="xyxy-0-1 and xyxy-0-1-square"):
        detect(written(CONVENTIONS["xyxy-0-1"], boxes, sizes), sizes)


def test_nothing_to_tell_by():
    for boxes in ([], [[0, 0, float("nan"), 1]]):
        with pytest.raises(Unsure, match="no boxes"):
            detect(boxes, [(10, 10)] * len(boxes))
    with pytest.raises(ValueError, match="1 boxes and 2 sizes"):
        detect([[0, 0, 1, 1]], [(10, 10)] * 2)
    with pytest.raises(ValueError, match="no box convention 'xyxy'; conventions: xyxy-pixels"):
        convention_of("xyxy")


@given(st.sampled_from(sorted(CONVENTIONS)), st.integers(10, 3000), st.integers(10, 3000), st.randoms())
@settings(max_examples=100, deadline=None)
def test_numbers_come_back_to_pixels(name, width, height, random):
    convention = CONVENTIONS[name]
    x1, x2 = sorted(random.random() * width for _ in range(2))
    y1, y2 = sorted(random.random() * height for _ in range(2))
    (row,) = written(convention, [(x1, y1, x2, y2)], [(width, height)])
    quantum = 10.0 ** -DECIMALS[convention.unit] * max(width, height) / TOP.get(convention.unit, max(width, height))
    assert convention.pixels(row, width, height) == pytest.approx((x1, y1, x2, y2), abs=1.01 * quantum)
