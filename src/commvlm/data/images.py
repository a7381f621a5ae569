"""Opening images that nobody has looked at: bounded, whole, RGB, or a one-line error."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Raster formats that Pillow decodes by itself; the others would start interpreters (EPS) or are rare."""
MAX_PIXELS = 89_478_485
"""Width x height; Pillow's own threshold for a decompression bomb."""
MAX_SIDE = 16_384
"""Pixels; a longer side would make the padded square too large, however thin the image is."""

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
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


class GreyImages:
    """An image processor that shows every image as a uniform grey of its size: the blind control."""

    def __init__(self, processor: Callable[..., Mapping[str, Any]]) -> None:
        self.processor = processor

    def __call__(self, *, images: Sequence[Image.Image], **kwargs: Any) -> Mapping[str, Any]:
        return self.processor(images=[Image.new("RGB", image.size, (128, 128, 128)) for image in images], **kwargs)


class _Refused(Exception):
    """An image that could be decoded and is not wanted."""


def _check_size(name: Path | str, width: int, height: int, *, side: int) -> None:
    if width * height > MAX_PIXELS:
        raise _Refused(f"{name}: {width} x {height} pixels are too many, at most {MAX_PIXELS} are read; shrink it")
    if max(width, height) > side:
        raise _Refused(f"{name}: {width} x {height} has a side longer than {side} pixels; crop or shrink it")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
