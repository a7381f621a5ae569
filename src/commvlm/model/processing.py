"""From pictures and text to the model's inputs, with Pillow and NumPy alone.

What is shown of a picture (padded to a square, by default) is resized once per distinct size, and normalised for each
encoder with its own mean and standard deviation.
"""

from __future__ import annotations

import base64
import binascii
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData

from .config import GEOMETRIES
from .names import choice

MAX_PIXELS = 64_000_000
"""Larger pictures are refused: a small file can unpack to many gigabytes."""
IMAGE_TOKEN = "<image>"
BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, TypeError, AttributeError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise on a damaged file."""


class ImageError(ValueError):
    """A picture that is missing, corrupt, too large or of a kind that cannot be read."""


def open_image(source: str | Path) -> Image.Image:
    """A picture file, or a `data:image/...;base64,` URL, decoded as it is stored, in its own mode.

    Boxes "in original pixels" are pixels of the stored array, as in COCO and its kin: EXIF orientation is not applied. Only
    the first frame of an animation is taken. Raises ImageError for a missing or corrupt file and for one of more than
    MAX_PIXELS pixels.
    """
    name = str(source)
    if name.startswith(("http://", "https://")):
        raise ImageError(f"image {name[:80]!r} is not a file; download it first")
    if name.startswith("data:"):
        return _decoded(BytesIO(_bytes_of(name)), name="of a data URL")
    path = Path(source)
    if not path.is_file():
        raise ImageError(f"image {path} does not exist")
    return _decoded(path, name=str(path))


def _bytes_of(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise ImageError(f"image {url[:40]!r} is no data:image/...;base64, URL")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ImageError(f"image {url[:40]!r} is no base64 ({error})") from error


def _decoded(source: Path | BytesIO, *, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check that follows is stricter
            image = Image.open(source)
        with image:
            check_size(image.size, name=name)
            image.load()
            return image.copy()
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is larger than {MAX_PIXELS:,} pixels; make it smaller first") from error
    except ImageError:
        raise
    except BROKEN as error:
        raise ImageError(f"image {name} cannot be read ({error}); replace it or leave it out") from error


def check_size(size: tuple[int, int], *, name: str) -> None:
    """size: width, height. Raises ImageError beyond MAX_PIXELS, or when a side is 0."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"image {name} has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller first")
    if min(width, height) < 1:
        raise ImageError(f"image {name} has {width} x {height} pixels; it is empty")


def to_rgb(image: Image.Image, *, background: tuple[int, int, int]) -> Image.Image:
    """The picture in 8-bit RGB; transparent parts show the background, 16-bit grey is scaled down."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"images of mode {image.mode!r} (32-bit values) have no known range; save it with 8 bits first"
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), layer).convert("RGB")
    return image.convert("RGB")


def pad_square(image: Image.Image, *, background: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side.

    It starts at pixel (side - width) // 2, (side - height) // 2 of the square, as in Shikra.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def center_crop(image: Image.Image) -> Image.Image:
    """The square in the picture's middle, as wide as its shorter side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))


class CommImageProcessor(BaseImageProcessor):
    """Pictures -> pixel_values (images, P).

    encoders: in the model's order, {"name", "size", "mean", "std"}; size in pixels, mean and std of RGB in [0, 1].
    geometry: what is shown of a picture: "pad-square", "stretch" (all of it, each side scaled on its own) or "center-crop".
    pad_color: RGB, 0 to 255, of the padding and behind transparent parts.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        encoders: Sequence[Mapping[str, Any]] = (),
        geometry: str = "pad-square",
        pad_color: Sequence[int] = (255, 255, 255),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.encoders = [dict(encoder) for encoder in encoders]
        self.geometry = choice(geometry, of=GEOMETRIES, what="geometry")
        self.pad_color = [int(value) for value in pad_color]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths become opened pictures; lists are walked; pictures and arrays come back as they are."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str | Path):
            return open_image(image_url_or_urls)
        return image_url_or_urls

    def shown(self, image: Image.Image | np.ndarray | str | Path) -> Image.Image:
        """What is shown of one picture, in RGB: all encoders' pixels are resized from it."""
        red, green, blue = self.pad_color
        background = (red, green, blue)
        picture = _as_picture(self.fetch_images(image))
        check_size(picture.size, name="given")
        picture = to_rgb(picture, background=background)
        if self.geometry == "stretch":
            return picture
        return center_crop(picture) if self.geometry == "center-crop" else pad_square(picture, background=background)

    def row(self, image: Image.Image | np.ndarray | str | Path, *, out: np.ndarray | None = None) -> np.ndarray:
        """One picture as (P,) float32: each encoder's normalised 3 x S x S pixels, flattened, one after another. out: where
        they are written; a new array by default."""
        shown = self.shown(image)
        resized: dict[int, np.ndarray] = {}
        row = np.empty(self.pixels, dtype=np.float32) if out is None else out
        start = 0
        for encoder in self.encoders:
            size = encoder["size"]
            if size not in resized:
                small = shown if shown.size == (size, size) else shown.resize((size, size), Image.Resampling.BICUBIC)
                resized[size] = np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1)).reshape(3, -1)
            # A byte has 256 values: looking the normalised ones up is several times faster than computing every pixel's.
            for values, table in zip(resized[size], _normalised(encoder), strict=True):
                np.take(table, values, out=row[start : start + values.size], mode="clip")
                start += values.size
        return row

    @property
    def pixels(self) -> int:
        """P, the length of a picture's row."""
        return sum(3 * encoder["size"] ** 2 for encoder in self.encoders)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """One picture or a (nested) list of pictures, arrays (H, W, 3) uint8 or paths -> pixel_values (images, P)."""
        flat = _flat(images)
        rows = np.empty((len(flat), self.pixels), dtype=np.float32)
        for image, row in zip(flat, rows, strict=True):
            self.row(image, out=row)
        return BatchFeature({"pixel_values": rows}, tensor_type=return_tensors)


def _normalised(encoder: Mapping[str, Any]) -> np.ndarray:
    """(3, 256) float32: what each byte of red, green and blue becomes for an encoder."""
    mean, std = (np.asarray(encoder[key], dtype=np.float32)[:, None] for key in ("mean", "std"))
    return (np.arange(256, dtype=np.float32) / 255 - mean) / std


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for entry in images for image in _flat(entry)]
    return [images]


def _as_picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    shape = getattr(image, "shape", "")
    raise ImageError(
        f"an image is a {type(image).__name__} {shape}; give a picture, a path, or a uint8 array (H, W, 3)"
    )


class CommProcessor(ProcessorMixin):
    """Pictures and text with one image token per picture -> the model's inputs.

    num_image_tokens: visual tokens of one picture; each image token is repeated so many times.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        num_image_tokens: int = 0,
        **kwargs: Any,
    ):
        self.image_token = image_token
        self.num_image_tokens = num_image_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it with commvlm.model.add_image_token")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What stands for one image in the text."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Placeholders per image, whatever its size: servers plan with this."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)
