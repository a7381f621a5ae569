"""Pictures to pixel_values, against arithmetic of our own; the processor's files; bad pictures."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_model_tiny import comm_specs, language_model_folder, tiny_tokenizer
from transformers import AutoImageProcessor, AutoProcessor

from commvlm.model import CommImageProcessor, ImageError, build_config, build_processor, open_image, processing

CLIP = {"name": "clip", "size": 8, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
DINO = {"name": "dino", "size": 12, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
TWIN = {"name": "twin", "size": 8, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_each_encoder_gets_its_own_normalisation_of_one_picture():
    image = picture(8, 8)
    row = CommImageProcessor([CLIP, TWIN])(image)["pixel_values"]
    assert row.shape == (1, 2 * 3 * 8 * 8)
    assert row.dtype == np.float32
    raw = np.asarray(image).astype(np.float64)
    clip, twin = row[0].reshape(2, 3, 8, 8)
    for channel in range(3):
        expected = (raw[..., channel] / 255 - CLIP["mean"][channel]) / CLIP["std"][channel]
        np.testing.assert_allclose(clip[channel], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(twin[channel], raw[..., channel] / 255, rtol=1e-6)


def test_each_encoder_gets_its_own_size_by_one_bicubic_resize_from_the_original():
    image = picture(40, 40)
    row = CommImageProcessor([CLIP, DINO])(image)["pixel_values"][0]
    assert row.shape == (3 * 8 * 8 + 3 * 12 * 12,)
    for encoder, piece in ((CLIP, row[: 3 * 64].reshape(3, 8, 8)), (DINO, row[3 * 64 :].reshape(3, 12, 12))):
        side = encoder["size"]
        small = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).astype(np.float64) / 255
        expected = (small - encoder["mean"]) / encoder["std"]
        np.testing.assert_allclose(piece, expected.transpose(2, 0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(8, 5), (5, 8), (8, 7), (8, 8)])
def test_the_picture_lies_in_the_middle_of_a_white_square(width, height):
    image = picture(width, height)
    row = CommImageProcessor([TWIN])(image)["pixel_values"].reshape(3, 8, 8)
    square = np.full((8, 8, 3), 255, np.uint8)
    left, top = (8 - width) // 2, (8 - height) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    np.testing.assert_allclose(row, square.transpose(2, 0, 1) / 255, atol=1e-6)


def test_the_pad_color_is_used():
    row = CommImageProcessor([TWIN], pad_color=(0, 51, 102))(picture(8, 2))["pixel_values"].reshape(3, 8, 8)
    np.testing.assert_allclose(row[:, 0, 0], [0, 0.2, 0.4], atol=1e-6)


def test_a_batch_is_its_pictures_one_by_one():
    processor = CommImageProcessor([CLIP, DINO])
    pictures = [picture(20, 30, seed) for seed in range(3)]
    batch = processor(pictures, return_tensors="pt")["pixel_values"]
    assert isinstance(batch, torch.Tensor)
    for image, row in zip(pictures, batch, strict=True):
        np.testing.assert_array_equal(processor(image)["pixel_values"][0], row.numpy())
    nested = processor([[pictures[0]], [pictures[1], pictures[2]]], return_tensors="pt")["pixel_values"]
    assert torch.equal(nested, batch)


def test_paths_arrays_and_pictures_are_the_same(tmp_path):
    image = picture(9, 7)
    image.save(tmp_path / "p.png")
    processor = CommImageProcessor([CLIP])
    rows = [
        processor(source)["pixel_values"]
        for source in (image, np.asarray(image), tmp_path / "p.png", str(tmp_path / "p.png"))
    ]
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_every_kind_of_picture_becomes_rgb():
    white = CommImageProcessor([TWIN])(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))["pixel_values"]
    np.testing.assert_allclose(white, 1)  # transparent shows the white background, not what lies under it
    grey = CommImageProcessor([TWIN])(Image.new("L", (8, 8), 51))["pixel_values"]
    np.testing.assert_allclose(grey, 0.2, atol=1e-6)
    deep = Image.fromarray(np.full((8, 8), 256 * 102 + 7, np.uint16))
    np.testing.assert_allclose(CommImageProcessor([TWIN])(deep)["pixel_values"], 0.4, atol=1e-6)
    palette = picture(8, 8).quantize(16)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(
        CommImageProcessor([TWIN])(palette)["pixel_values"].reshape(3, 8, 8), expected, atol=1e-6
    )
    with pytest.raises(ImageError, match="32-bit"):
        CommImageProcessor([TWIN])(Image.new("F", (8, 8)))


def test_a_file_is_read_as_stored_whatever_its_orientation_says(tmp_path):
    image = picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "p.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "p.png")), np.asarray(image))


def test_bad_picture_files_are_one_line_errors(tmp_path, monkeypatch):
    picture(64, 64).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    png = tmp_path / "good.png"
    picture(64, 64).save(png)
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[:200])
    for name in ("cut.jpg", "text.png", "empty.png", "cut.png", "missing.png", "", "http://x.org/a.png"):
        source = name if name.startswith("http") else tmp_path / name
        with pytest.raises(ImageError) as error:
            open_image(source)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    monkeypatch.setattr(processing, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ImageError, match="64 x 64 pixels, more than 4,095; make it smaller"):
        open_image(png)
    with pytest.raises(ImageError, match="64 x 64 pixels"):
        CommImageProcessor([TWIN])(picture(64, 64))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says width x height."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"0" * 100)),
        (b"IEND", b""),
    )
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_small_file_that_claims_a_huge_picture_is_refused_before_it_is_unpacked(tmp_path, side, recwarn):
    (tmp_path / "bomb.png").write_bytes(png_that_claims(side, side))
    with pytest.raises(ImageError, match="64,000,000"):
        open_image(tmp_path / "bomb.png")
    assert not recwarn.list


def test_what_is_no_picture_is_refused():
    processor = CommImageProcessor([TWIN])
    for thing in (np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8), 7, None):
        with pytest.raises(ImageError, match="give a picture"):
            processor(thing)


TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}"
    "{{ '<image> ' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    root = tmp_path_factory.mktemp("processing")
    config = build_config(comm_specs(root), language_model=language_model_folder(root))
    return build_processor(config, tiny_tokenizer(), chat_template=TEMPLATE)


def test_the_processor_repeats_the_placeholder_per_visual_token(processor):
    inputs = processor(
        images=[picture(9, 9), picture(5, 9)],
        text=["what is <image> ?", "<image> cat"],
        padding=True,
        return_tensors="pt",
    )
    image = processor.image_token_id
    assert processor.num_image_tokens == 16
    assert (inputs["input_ids"] == image).sum(1).tolist() == [16, 16]
    assert inputs["attention_mask"][1].tolist() == [0, 0] + [1] * 17  # padded on the left
    assert inputs["pixel_values"].shape == (2, 2 * 3 * 32 * 32)


def test_more_or_fewer_pictures_than_placeholders_are_refused(processor):
    with pytest.raises(ValueError, match="2 <image> tokens and 1 images"):
        processor(images=[picture(9, 9)], text="<image> <image>")


def test_the_processor_survives_saving_and_the_auto_classes_find_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "comm"}')
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.chat_template == TEMPLATE
    assert loaded.num_image_tokens == 16
    settings = {"text": "what is <image> ?", "images": picture(20, 9), "return_tensors": "pt"}
    before, after = processor(**settings), loaded(**settings)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), CommImageProcessor)


def test_chat_template_and_server_counts(processor):
    content = [{"type": "image", "image": picture(9, 9)}, {"type": "text", "text": "what is this ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"].tolist() == [[processor.image_token_id] * 16 + [5, 6, 7, 8]]
    assert inputs["pixel_values"].shape == (1, 2 * 3 * 32 * 32)
    assert processor._get_num_multimodal_tokens(image_sizes=[(4, 4), (900, 3)])["num_image_tokens"] == [16, 16]


def test_a_real_photo_is_read():
    photo = SAMPLES / "coco_images" / "000000039769.png"
    if not photo.exists():
        pytest.skip("the sample photos are not beside the project")
    row = CommImageProcessor([{**CLIP, "size": 336}, {**DINO, "size": 336}])(photo)["pixel_values"]
    assert row.shape == (1, 2 * 3 * 336 * 336)
    assert np.isfinite(row).all()
