"""What is the same image under several names: COCO's, Visual Genome's and Visual7W's."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GENOME = ("VG_100K", "VG_100K_2")
"""Visual Genome's folders of images."""
GQA = ("gqa", "images")
"""The end of the folder of GQA's copies of them."""
IMAGE_DATA = "image_data.json"
"""Visual Genome's list of its images: of those that are COCO's it says the number there."""
_COCO = re.compile(r"(?:COCO_[a-z]+20\d\d_)?(\d{12})")
_NUMBER = re.compile(r"(v7w_)?(\d{1,9})")
_HASH = re.compile(r"(?:(.+)-)?[0-9a-f]{32}")
"""The name that an image out of a row was written by, see `written_name`."""


def image_key(path: Path) -> str:
    """COCO's twelve digits, whatever stands before them; the same for an image of Visual Genome's (in its folders or GQA's,
    or with v7w_ before its number) that is COCO's by the `IMAGE_DATA` near it; else the path itself.

    Raises ValueError for an image_data.json that is not what it says.
    """
    hashed = _HASH.fullmatch(path.stem)
    digits = _COCO.fullmatch((hashed and hashed[1]) or path.stem)
    if digits:
        return f"coco:{int(digits[1])}"
    number = _genome_number(path)
    if number is None:
        return os.path.abspath(path)
    coco = (_coco_numbers(path.parent) or {}).get(number)
    return f"vg:{number}" if coco is None else f"coco:{coco}"


def unplaced(paths: Iterable[Path]) -> int:
    """How many are Visual Genome's with no `IMAGE_DATA` near them: which of these are COCO's is not known."""
    return sum(_genome_number(path) is not None and _coco_numbers(path.parent) is None for path in paths)


def written_name(content: bytes, said: str | None, ending: str) -> str:
    """What an image out of a row is called: the hash of its bytes, behind what the row calls it, where it does."""
    stem = re.sub(r"[^\w.+-]", "_", Path(said).stem)[:100] if said else ""
    digest = hashlib.sha256(content).hexdigest()[:32]
    return f"{stem}-{digest}{ending}" if stem else f"{digest}{ending}"


def nameless(paths: Iterable[Path]) -> int:
    """How many came out of rows that do not say what they are called: whose they are is not known."""
    found = (_HASH.fullmatch(path.stem) for path in paths)
    return sum(match is not None and match[1] is None for match in found)


def _genome_number(path: Path) -> int | None:
    found = _NUMBER.fullmatch(path.stem)
    theirs = path.parent.name in GENOME or path.parts[-3:-1] == GQA
    return int(found[2]) if found and (found[1] or theirs) else None


@functools.lru_cache(maxsize=16)
def _coco_numbers(folder: Path) -> dict[int, int] | None:
    """Number at Visual Genome -> number at COCO, from the list in this folder or one above, or in a vg/ beside these."""
    above = [folder, *folder.parents][:4]
    near = (place for parent in above for place in (parent / IMAGE_DATA, parent / "vg" / IMAGE_DATA))
    file = next((place for place in near if place.is_file()), None)
    if file is None:
        return None
    try:
        rows: Any = json.loads(file.read_text(encoding="utf-8"))
        numbers = {int(row["image_id"]): row["coco_id"] for row in rows}
        return {number: int(coco) for number, coco in numbers.items() if coco is not None}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: is no list of Visual Genome's images ({error})"[:300]) from error
