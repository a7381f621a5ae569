"""Visual Genome's regions: [{"id" or "image_id", "regions": [{region_id, x, y, width, height, phrase}]}].

image_data.json: [{image_id, url, width, height, ...}]. The images lie in two folders, VG_100K and VG_100K_2; which one, the
url says.
"""

from __future__ import annotations

from pathlib import Path

from ..example import Example
from ..image_keys import GENOME
from .entry import Entry, EntryError, Read, made
from .files import image_folder, read_list
from .refer import Refer, referring


def read_genome(*, images: Path, regions: Path, image_data: Path | None = None, task: Refer = "gc") -> Read:
    """One example a region. images: the folder that holds VG_100K and VG_100K_2 (as image_data.json places the images; they
    are looked for in both without it), or all images themselves.

    ids are the regions'. facts: region_id, image_id, and with image_data width and height.
    """
    if task not in ("rec", "reg", "gc"):
        raise ValueError(f"visual-genome: task is {task!r}, it must be rec or reg or gc")
    places = Places(image_folder(images), image_data)
    yield from made(read_list(regions, "image"), lambda entry: _regions(entry, places, task))


def _regions(entry: Entry, places: Places, task: Refer) -> list[Example | EntryError]:
    if entry.value.get("regions") == []:
        return []
    image_id = entry.integer("image_id" if entry.has("image_id") else "id")
    image, size = places.of(entry, image_id)

    def make(region: Entry) -> Example:
        key = region.integer("region_id")
        facts = {"region_id": key, "image_id": image_id, **size}
        return referring(str(key), image, region.plain("phrase").strip(), region.named_box(), task=task, facts=facts)

    return list(made(entry.each("regions", "region"), make))


class Places:
    """Where the images of Visual Genome lie, by their numbers. Other sets (PointQA) use the same images."""

    def __init__(self, images: Path, image_data: Path | None) -> None:
        self.images = images
        self.split = [folder for folder in GENOME if (images / folder).is_dir()]
        self.data: dict[int, Entry] | None = None
        if image_data is not None:
            self.data = {}
            for entry in read_list(image_data, "image"):
                if isinstance(entry, EntryError):
                    raise entry
                self.data[entry.integer("image_id")] = entry

    def of(self, entry: Entry, image_id: int) -> tuple[Path, dict[str, str | int | float]]:
        """An image's file and, where image_data says it, its size."""
        name, size = f"{image_id}.jpg", {}
        if self.data is not None:
            if image_id not in self.data:
                raise entry.error(f"is about image {image_id}, which image_data does not have")
            known = self.data[image_id]
            size = known.size()
            folder = known.text("url").rsplit("/", 2)[-2] if "/" in known.text("url") else ""
            if folder in self.split:
                return self.images / folder / name, size
        for folder in self.split[:-1]:
            if (self.images / folder / name).is_file():
                return self.images / folder / name, size
        return self.images.joinpath(*self.split[-1:], name), size
