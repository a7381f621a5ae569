"""Sources turned into stores once: what is to be prepared, what is already, and what a store no longer fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .readers import Faults, stream
from .store import VERSION, Stored, write_store

BELOW = ("datasets", "mme")
"""Formats whose files lie in folders within the one that is named."""


def fingerprint(format: str, images: Path, files: Mapping[str, Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a store is made from: format, options, and every file's name, size and time, wherever the data were moved to.
    Another value asks for another store."""
    described = {name: _described(path, below=format in BELOW) for name, path in files.items()}
    if not files:
        described["images"] = _described(images, below=format in BELOW)
    said = {"version": VERSION, "format": format, "options": dict(options), "files": described}
    return json.loads(json.dumps(said, default=str))


def _described(path: Path, *, below: bool = False) -> list[Any]:
    """Name, size and time of change of a file; of a folder, those of what lies directly in it, or of all files below it, in
    one hash."""
    if path.is_dir():
        digest = hashlib.sha256()
        for item in sorted(file for file in path.rglob("*") if file.is_file()) if below else sorted(path.iterdir()):
            place = item.relative_to(path).as_posix()
            digest.update(json.dumps([place, item.stat().st_size, item.stat().st_mtime_ns]).encode())
        return [path.name, digest.hexdigest()]
    if not path.is_file():
        raise ValueError(f"{path}: there is no such annotation file")
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def prepare_source(
    folder: Path, format: str, images: Path, files: Mapping[str, Path], options: Mapping[str, Any]
) -> Stored:
    """The source's store in `folder`, made now unless it is there and fits. Entries that make no example are skipped and
    counted in its meta, with their first places. Raises ValueError for files that are not what they say."""
    made_from = fingerprint(format, images, files, options)
    stored = open_prepared(folder, images, made_from)
    if stored is not None:
        return stored
    faults = Faults()
    meta: dict[str, Any] = {"source": made_from}

    def counted() -> Any:
        yield from stream(format, images=images, faults=faults, **files, **options)
        meta["skipped"] = {"count": faults.count, "kinds": dict(faults.kinds), "places": faults.places}

    write_store(folder, counted(), images, meta)
    return Stored(folder, images)


def open_prepared(folder: Path, images: Path, made_from: Mapping[str, Any]) -> Stored | None:
    """The store, if it is there, whole, and was made from these files; None otherwise."""
    try:
        stored = Stored(folder, images)
    except ValueError:
        return None
    return stored if stored.meta.get("source") == made_from else None
