"""What every source needs, where it comes from, under which licence, how large it is; and fetching what has a direct link.

Sizes and SHA-256 of COCO's archives are those that TensorFlow Datasets publishes (url_checksums/coco.txt). The other hosts
publish none: the hash of the first download is kept in checksums.json beside the files, and held against every later one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKSUMS = "checksums.json"
CHUNK = 1 << 20
Advance = Callable[[int, int | None], None]
"""Bytes that came, and how many there will be in all (None where the server does not say)."""


@dataclass(frozen=True)
class Item:
    """name; url: a direct link, or the page to get it from by hand (direct False); folder: under data.root, where it is
    unpacked or put; size: bytes, or a word; sha256: where one is published; licence; for_: formats that need it."""

    name: str
    url: str
    folder: str
    licence: str
    for_: str
    size: int | str = "?"
    sha256: str | None = None
    direct: bool = True


COCO_LICENCE = "images: Flickr terms; annotations CC BY 4.0"
_COCO = "http://images.cocodataset.org"
_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_OKVQA = "https://okvqa.allenai.org/static/data"
_REFER = "https://bvisionweb1.cs.unc.edu/licheng/referit/data"
_VG = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset"
_VG_IMAGES = "https://cs.stanford.edu/people/rak248/VG_100K_2"
_V7W = "https://ai.stanford.edu/~yukez/papers/resources"
_POPE = "https://raw.githubusercontent.com/AoiDragon/POPE"
_LLAVA = "https://huggingface.co/datasets/liuhaotian"
_SHIKRA = "https://github.com/shikras/shikra (docs/data.md there names the archive)"

ITEMS = (
    Item("coco-train2014", f"{_COCO}/zips/train2014.zip", "coco", COCO_LICENCE, "refer vqa coco-captions llava",
         13_510_573_713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    Item("coco-val2014", f"{_COCO}/zips/val2014.zip", "coco", COCO_LICENCE, "pope vqa karpathy",
         6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    Item("coco-test2015", f"{_COCO}/zips/test2015.zip", "coco", COCO_LICENCE, "vqa (test, test-dev)",
         13_270_587_935, "1a2aa896b81140a850a78fa8bff07d455698d2abf364ff05721763458a8101ca"),
    Item("coco-annotations", f"{_COCO}/annotations/annotations_trainval2014.zip", "coco", "CC BY 4.0", "coco-captions",
         252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
    *(Item(f"vqav2-{part.lower()}-{split.lower()}", f"{_VQA}/v2_{part}_{split}_mscoco.zip", "vqa", "CC BY 4.0", "vqa")
      for part, splits in (("Questions", ("Train", "Val", "Test")), ("Annotations", ("Train", "Val"))) for split in splits),
    *(Item(f"okvqa-{name}-{split}", f"{_OKVQA}/{file.format(split)}", "okvqa", "CC BY 4.0", "ok-vqa")
      for name, file in (("questions", "OpenEnded_mscoco_{}2014_questions.json.zip"),
                         ("annotations", "mscoco_{}2014_annotations.json.zip"))
      for split in ("train", "val")),
    *(Item(name, f"{_REFER}/{name}.zip", "refer", "Apache-2.0 (refer); expressions for research", "refer")
      for name in ("refcoco", "refcoco+", "refcocog")),
    Item("karpathy", "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip", "karpathy",
         "not stated", "karpathy"),
    *(Item(f"pope-{name}", f"{_POPE}/main/output/coco/coco_pope_{name}.json", "pope", "MIT", "pope")
      for name in ("random", "popular", "adversarial")),
    Item("pope-random-2910", f"{_POPE}/e3e3926/output/coco/coco_pope_random.json", "pope/2023", "MIT",
         "pope (the file of the published figures)"),
    Item("vg-regions", f"{_VG}/region_descriptions.json.zip", "vg", "CC BY 4.0", "visual-genome"),
    Item("vg-image-data", f"{_VG}/image_data.json.zip", "vg", "CC BY 4.0", "visual-genome pointqa"),
    Item("vg-images-1", f"{_VG_IMAGES}/images.zip", "vg", "CC BY 4.0", "visual-genome pointqa", "about 10 GB"),
    Item("vg-images-2", f"{_VG_IMAGES}/images2.zip", "vg", "CC BY 4.0", "visual-genome pointqa", "about 5 GB"),
    Item("v7w-pointing", f"{_V7W}/dataset_v7w_pointing.zip", "visual7w", "not stated (toolkit MIT)", "visual7w"),
    Item("v7w-images", "http://vision.stanford.edu/yukezhu/visual7w_images.zip", "visual7w", "Flickr terms", "visual7w"),
    Item("llava-pretrain", f"{_LLAVA}/LLaVA-Pretrain", "llava", "by source (LAION, CC, SBU)", "llava", "about 27 GB",
         direct=False),
    Item("llava-instruct", f"{_LLAVA}/LLaVA-Instruct-150K/resolve/main/llava_instruct_150k.json", "llava", "CC BY-NC 4.0",
         "llava"),
    Item("llava-cc3m", f"{_LLAVA}/LLaVA-CC3M-Pretrain-595K", "llava", "CC3M terms", "llava", "about 6 GB", direct=False),
    Item("flickr30k", "https://shannon.cs.illinois.edu/DenotationGraph", "flickr30k", "on request; research and education",
         "karpathy flickr30k-entities", "about 4 GB", direct=False),
    Item("flickr30k-entities", "https://github.com/BryanPlummer/flickr30k_entities", "flickr30k_entities",
         "research and education", "flickr30k-entities", direct=False),
    Item("pointqa", "https://github.com/princetonvisualai/pointingqa", "pointqa", "not stated", "pointqa", direct=False),
    Item("shikra-lists", _SHIKRA, "shikra", "CC BY-NC 4.0", "refer-jsonl shikra-*", direct=False),
    Item("vcr", "https://visualcommonsense.com/download", "vcr", "on request; research", "vcr", direct=False),
    Item("mme", "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation)", "mme",
         "on request; research", "mme", direct=False),
)  # fmt: skip


def item_named(name: str) -> Item:
    """An item by its name; ValueError names all."""
    found = next((item for item in ITEMS if item.name == name), None)
    if found is None:
        raise ValueError(f"there is no download {name!r}; downloads: {', '.join(item.name for item in ITEMS)}")
    return found


def fetch(item: Item, root: Path, advance: Advance = lambda came, size: None) -> Path:
    """Downloads an item under `root`, checks it, unpacks a zip, and returns its folder. What is there already stays.

    An interrupted download goes on from where it stopped, where the server allows it. Raises ValueError, in one line, for an
    item without a direct link, without a network, for a wrong size or hash, and for an archive that would write elsewhere.
    """
    if not item.direct:
        raise ValueError(f"{item.name} has no direct link: get it from {item.url} and put it in {root / item.folder}")
    folder, name = root / item.folder, item.url.rsplit("/", 1)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    file, done = folder / name, folder / f".{name}.done"
    if done.exists():
        return folder
    if not file.exists():
        part = folder / f"{name}.part"
        _download(item, part, advance)
        _check(item, part, root)
        os.replace(part, file)
    if name.endswith(".zip"):
        _unpack(file, folder)
    done.touch()
    return folder


def _download(item: Item, part: Path, advance: Advance) -> None:
    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(item.url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            going_on = answer.status == 206
            length = answer.headers.get("Content-Length")
            size = None if length is None else int(length) + (begun if going_on else 0)
            advance(begun if going_on else 0, size)
            with part.open("ab" if going_on else "wb") as file:
                while piece := answer.read(CHUNK):
                    file.write(piece)
                    advance(len(piece), size)
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:  # all of it is there already
            return
        raise ValueError(f"{item.name}: {item.url} answers {error.code} ({error.reason}); get it by hand") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{item.name}: {item.url} cannot be reached ({reason}); the same command goes on") from error
    came = part.stat().st_size
    if size is not None and came != size:
        raise ValueError(f"{item.name}: {came:,} of {size:,} bytes came, then no more; the same command goes on")


def _check(item: Item, part: Path, root: Path) -> None:
    """Size and hash as they are known; the first hash of a file whose host publishes none is kept for later."""
    if isinstance(item.size, int) and part.stat().st_size != item.size:
        found = part.stat().st_size
        part.unlink()
        raise ValueError(f"{item.name}: {found:,} bytes came, it has {item.size:,}; it was removed, fetch it again")
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kept = root / CHECKSUMS
    known = json.loads(kept.read_text()) if kept.exists() else {}
    wanted = item.sha256 or known.get(item.name)
    if wanted is None:
        text = json.dumps({**known, item.name: digest}, indent=1, sort_keys=True)
        temporary = kept.with_name(f"{CHECKSUMS}.part")
        temporary.write_text(text)
        os.replace(temporary, kept)
    elif digest != wanted:
        part.unlink()
        raise ValueError(f"{item.name}: SHA-256 is {digest}, it must be {wanted}; it was removed, fetch it again")


def _unpack(archive: Path, folder: Path) -> None:
    """A zip's files, each whole or not at all. Raises ValueError for one that would be written outside the folder."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                target = folder / entry.filename
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise ValueError(
                        f"{archive}: holds {entry.filename!r}, which lies outside; nothing more is unpacked"
                    )
                if entry.is_dir() or (target.is_file() and target.stat().st_size == entry.file_size):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part")
                with zipped.open(entry) as source, part.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
                os.replace(part, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive}: cannot be unpacked ({error}); remove it and fetch it again") from error
