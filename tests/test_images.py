"""Images as they are stored, damaged, too large, and what is refused."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from commvlm.data import images as images_module
from commvlm.data.images import open_image


def saved(path, image, **kwargs):
    image.save(path, **kwargs)
    return path


GRADIENT = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)


def test_images_as_stored(tmp_path):
    opened = open_image(saved(tmp_path / "a.png", Image.fromarray(GRADIENT)))
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), GRADIENT)
    assert open_image(saved(tmp_path / "l.png", Image.new("L", (3, 2), 7))).getpixel((0, 0)) == (7, 7, 7)
    assert open_image(saved(tmp_path / "c.jpg", Image.new("CMYK", (3, 2)))).mode == "RGB"
    clear = open_image(saved(tmp_path / "t.png", Image.new("RGBA", (3, 2), (255, 0, 0, 0))))
    assert clear.getpixel((1, 1)) == (255, 255, 255)


def test_orientation_is_not_applied(tmp_path):
    """Boxes count pixels of the stored array: a turned picture would move them."""
    image = Image.fromarray(GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(saved(tmp_path / "a.jpg", image, exif=exif)).size == (30, 20)


def broken_files():
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(whole, format="PNG")
    jpeg = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(jpeg, format="JPEG")
    yield "half.png", whole.getvalue()[:5000], "damaged or truncated"
    yield "half.jpg", jpeg.getvalue()[:2000], "damaged or truncated"
    flipped = bytearray(whole.getvalue())
    flipped[60:80] = b"\0" * 20
    yield "flipped.png", bytes(flipped), "damaged or truncated"
    yield "text.png", b"no image at all", "is no image"
    yield "empty.jpg", b"", "is no image"
    yield "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is no image"


@pytest.mark.parametrize(("name", "content", "match"), list(broken_files()))
def test_damaged_images(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ValueError, match=match) as caught:
        open_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such image file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="no such image file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="a side longer than"):
        open_image(saved(tmp_path / "thin.png", Image.new("L", (images_module.MAX_SIDE + 1, 1))))
    with pytest.raises(ValueError, match="not 8 bits"):
        open_image(saved(tmp_path / "deep.png", Image.new("I;16", (3, 3))))
    monkeypatch.setattr(images_module, "MAX_PIXELS", 500)
    with pytest.raises(ValueError, match="30 x 20 pixels are too many, at most 500"):
        open_image(saved(tmp_path / "many.png", Image.fromarray(GRADIENT)))


def test_a_bomb_is_not_unpacked(tmp_path):
    """A header that promises 30,000 x 30,000 pixels is refused before any pixel is decoded."""
    header = io.BytesIO()
    Image.new("1", (1, 1)).save(header, format="PNG")
    content = bytearray(header.getvalue())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(ValueError, match="too large"):
        open_image(tmp_path / "bomb.png")
