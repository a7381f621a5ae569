"""Opening images that nobody has looked at: bounded, whole, RGB, or a one-line error."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Raster formats that Pillow decodes by itself; the others would start interpreters (EPS) or are rare."""
MAX_PIXELS = 89_478_485
"""Width x height; Pillow's own threshold for a decompression bomb."""
MAX_SIDE = 16_384
"""Pixels; a longer side would make the padded square too large, however thin the image is."""

_BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, TypeError, AttributeError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise on a damaged file."""


def open_image(path: Path) -> Image.Image:
    """The image as stored, in RGB.

    Its EXIF orientation is not applied: annotations (COCO, Visual Genome, Shikra's lines) count pixels of the stored
    array, as pycocotools and Shikra read it. Transparent parts become white, as the padding is. Raises ValueError
    that names the path for a missing, damaged, truncated, too large or 16-bit image.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such image file; check the folder of images and the annotation's name")
    return _opened(path, name=path, side=MAX_SIDE)


def decode_image(data: bytes, *, name: str, side: int = MAX_SIDE) -> Image.Image:
    """A file's bytes as `open_image` has them. name: what an error calls it. side: the longest that is decoded, in pixels."""
    return _opened(BytesIO(data), name=name, side=side)


def _opened(source: Path | BytesIO, *, name: Path | str, side: int) -> Image.Image:
    try:
        with Image.open(source, formats=FORMATS) as image:
            _check_size(name, *image.size, side=side)
            if image.mode.startswith(("I", "F")):
                raise _Refused(f"{name}: has {image.mode} pixels, not 8 bits a channel; convert it first")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            if image.mode == "RGB":
                image.load()  # converting would copy
                return image
            return image.convert("RGB")
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: too large ({error}); at most {MAX_PIXELS} pixels are read") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: is no image; {', '.join(FORMATS)} can be read") from error
    except _BROKEN as error:
        raise ValueError(f"{name}: cannot be decoded, the file is damaged or truncated ({_line(error)})") from error


def open_grey(path: Path) -> Image.Image:
    """A uniform grey of the image's size: the blind control."""
    return Image.new("RGB", open_image(path).size, (128, 128, 128))


def open_another(path: Path) -> Image.Image:
    """Another image of the same folder at this one's size, always the same one: the control in which what is seen is a true
    picture and says nothing about the question. Raises ValueError where the folder holds no other."""
    size = open_image(path).size
    names = _pictures(path.parent)
    if len(names) < 2:
        raise ValueError(f"{path}: its folder holds no other image to show in its place (data.pixels shuffled)")
    another = names[(names.index(path.name) + max(1, len(names) // 2)) % len(names)]
    return open_image(path.parent / another).resize(size)


@lru_cache(maxsize=64)
def _pictures(folder: Path) -> tuple[str, ...]:
    """The folder's image files in an order that has nothing to do with what they show: by a hash of their names."""
    names = [p.name for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")]
    return tuple(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()))


OPENERS: dict[str, Callable[[Path], Image.Image]] = {"given": open_image, "grey": open_grey, "shuffled": open_another}
"""What a model is shown of an image: itself, or what a control shows in its place."""


class _Refused(Exception):
    """An image that could be decoded and is not wanted."""


def _check_size(name: Path | str, width: int, height: int, *, side: int) -> None:
    if width * height > MAX_PIXELS:
        raise _Refused(f"{name}: {width} x {height} pixels are too many, at most {MAX_PIXELS} are read; shrink it")
    if max(width, height) > side:
        raise _Refused(f"{name}: {width} x {height} has a side longer than {side} pixels; crop or shrink it")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
