"""How many examples the known splits have, so that a file that was cut, exploded or confused is seen at once.

Counts are facts of the sets, by the names of their files: the refer tool's and Karpathy's splits, the VQA, OK-VQA, POPE, MME
and Visual7W releases, LLaVA's files, and Shikra's lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Known:
    """A split by format, pattern of a file's path, and options; counts: how many examples, and which version that is."""

    name: str
    format: str
    pattern: str
    options: Mapping[str, Any]
    counts: Mapping[int, str]


def _refer(name: str, pattern: str, sentences: Mapping[str, int], objects: Mapping[str, int]) -> list[Known]:
    by_sentence = [
        Known(f"{name} {split}, expressions", "refer", pattern, {"split": split, **options}, {count: ""})
        for split, count in sentences.items()
        for options in ({"task": "rec"}, {"task": "reg", "group": "line"})
    ]
    by_object = [
        Known(f"{name} {split}, objects", "refer", pattern, {"split": split, "task": "reg"}, {count: ""})
        for split, count in objects.items()
    ]
    return by_sentence + by_object


def _named(format: str, rows: Mapping[str, tuple[str, int]]) -> list[Known]:
    return [Known(name, format, pattern, {}, {count: ""}) for name, (pattern, count) in rows.items()]


_POPE_RANDOM = {
    2910: "the 2023 file, on which Shikra's and COMM's figures were measured (1,500 yes, 1,410 no)",
    3000: "the file since October 2023; Shikra's and COMM's figures are for 2,910 questions, so they do not compare",
}
KNOWN = [
    *_refer(
        "RefCOCO", r"refcoco/refs\(unc\)\.p$",
        {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
        {"train": 42_404, "val": 3_811, "testA": 1_975, "testB": 1_810},
    ),
    *_refer(
        "RefCOCO+", r"refcoco\+/refs\(unc\)\.p$",
        {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889}, {},
    ),
    *_refer(
        "RefCOCOg (umd)", r"refcocog/refs\(umd\)\.p$",
        {"train": 80_512, "val": 4_896, "test": 9_602}, {"train": 42_226, "val": 2_573, "test": 5_023},
    ),
    *_named(
        "vqa",
        {
            "VQAv2 train": (r"v2_OpenEnded_mscoco_train2014_questions\.json$", 443_757),
            "VQAv2 val": (r"v2_OpenEnded_mscoco_val2014_questions\.json$", 214_354),
            "VQAv2 test": (r"v2_OpenEnded_mscoco_test2015_questions\.json$", 447_793),
            "VQAv2 test-dev": (r"v2_OpenEnded_mscoco_test-dev2015_questions\.json$", 107_394),
        },
    ),
    *_named(
        "ok-vqa",
        {
            "OK-VQA train": (r"(^|/)OpenEnded_mscoco_train2014_questions\.json$", 9_009),
            "OK-VQA val": (r"(^|/)OpenEnded_mscoco_val2014_questions\.json$", 5_046),
        },
    ),
    *(
        Known(f"{name} Karpathy {split}, images", "karpathy", pattern, {"split": split, "per": "image"}, {count: ""})
        for name, pattern, counts in (
            ("COCO", r"dataset_coco\.json$", {"train+restval": 113_287, "val": 5_000, "test": 5_000}),
            ("Flickr30k", r"dataset_flickr30k\.json$", {"train": 29_000, "val": 1_014, "test": 1_000}),
        )
        for split, count in counts.items()
    ),
    *_named(
        "flickr30k-entities",
        {
            f"Flickr30k Entities {split}": (rf"(^|/){split}\.txt$", count)
            for split, count in {"train": 148_915, "val": 5_000, "test": 5_000}.items()
        },
    ),
    *(
        Known(f"Visual7W pointing {split}", "visual7w", r"dataset_v7w_pointing\.json$", {"split": split}, {count: ""})
        for split, count in {"train": 93_813, "val": 36_990, "test": 57_265}.items()
    ),
    Known("POPE random", "pope", r"coco_pope_random[^/]*\.json$", {}, _POPE_RANDOM),
    *_named("pope", {f"POPE {s}": (rf"coco_pope_{s}\.json$", 3_000) for s in ("popular", "adversarial")}),
    Known("MME", "mme", r"", {"subtasks": None}, {2_374: ""}),
    *_named(
        "llava",
        {
            "LLaVA pretrain 558K": (r"blip_laion_cc_sbu_558k\.json$", 558_128),
            "LLaVA pretrain CC3M 595K": (r"(^|/)chat\.json$", 595_375),
            "LLaVA-Instruct 150K": (r"llava_instruct_150k\.json$", 157_712),
        },
    ),
    *_named("shikra-spotting", {"Flickr30k spotting train": (r"CWB_flickr30k_train\.jsonl$", 148_915)}),
    *_named("shikra-pointqa-local", {"PointQA local train": (r"pointQA_local_train\.jsonl$", 27_426)}),
    *_named("shikra-v7w", {"Visual7W pointing train": (r"v7w_pointing_train\.jsonl$", 93_813)}),
]  # fmt: skip
DEFAULTS: dict[str, Any] = {"task": "rec", "group": None, "per": "image", "subtasks": None}
"""What the readers above take where nothing is said."""


def size_note(format: str, files: Mapping[str, str | Path], options: Mapping[str, Any], count: int) -> str | None:
    """What there is to say about the number of examples of a source: which version it is, or how it differs from the known
    number. None for a set that is not known, and for the one number that it should have."""
    for known in KNOWN:
        if known.format != format or not _fits(known, files, options):
            continue
        if count in known.counts:
            said = known.counts[count]
            return f"{known.name}: {count:,}, {said}" if said else None
        right = " or ".join(f"{number:,}" for number in known.counts)
        return f"{known.name} has {right} examples, here are {count:,}: another version, a cut file, or images left out"
    return None


def _fits(known: Known, files: Mapping[str, str | Path], options: Mapping[str, Any]) -> bool:
    paths = [Path(path).as_posix() for path in files.values()] or [""]
    if not any(re.search(known.pattern, path) for path in paths):
        return False
    given = {**DEFAULTS, **options}
    wanted = {"group": None, **known.options} if "task" in known.options else known.options
    if wanted.get("task") == "reg" and wanted.get("group") is None and given["group"] == "object":
        given["group"] = None
    return all(given[name] == value for name, value in wanted.items())
