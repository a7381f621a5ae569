"""A study's results as one file that others can go on from: an xz-compressed line of JSON for every run that is done.

A result is known by its run's key, the hash of all that it depends on, so a grid takes from such a file what it would have
made itself, and nothing else. The file comes from anywhere: it is read as data, within bounds.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

from ..evaluate.receipts import write_json
from ..model.storage import writing
from .checks import checked, same_questions
from .results import read_results
from .runs import Places, note_failed

LINE = 8 << 20
"""Bytes of one result at most; one of five tasks on 300 images has 90,000."""
TOTAL = 1 << 30
"""Bytes of all results at most."""
MEMORY = 256 << 20
"""Bytes that unpacking may take."""


def pack(places: Places, target: Path) -> int:
    """Writes the results of all runs of the study's grid that are done; returns how many. The same ones give the same bytes.

    Raises ValueError where there is none, or where one is broken.
    """
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name the file to write, such as {target / 'runs.jsonl.xz'}")
    done = read_results(places).runs
    if not done:
        raise ValueError(f"{places.root}: no run is done, there is nothing to put into {target}")
    lines = [json.dumps(done[key], separators=(",", ":"), sort_keys=True) for key in sorted(done)]
    for key, line in zip(sorted(done), lines, strict=True):
        checked(line, str(places.result(key)))
        if len(line) > LINE:
            raise ValueError(f"{places.result(key)} has {len(line):,} bytes; a line may have {LINE:,}")
    part = target.with_name(target.name + ".part")
    try:
        with writing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=6))
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return len(done)


def read_bundle(source: Path, keys: Collection[str], places: Places, *, tasks: Collection[str]) -> dict[str, str]:
    """Those `keys` that have no result and are in the file -> their lines. tasks: of the study's scale.

    Raises ValueError naming file and line where it is no such file, or where its questions are not those of the study.
    """
    known = next((places.result(key) for key in keys if places.done(key)), None)
    first = None if known is None else json.loads(known.read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(source), 1):
        where = f"{source}, line {number}"
        result = checked(line, where)
        key = result["key"]
        if key in found:
            raise ValueError(f"{where}: key {key} is there twice")
        if key in keys and not places.done(key):
            first = first or result
            same_questions(result, first, tasks, where)
            found[key] = line
    return found


def keep(found: dict[str, str], source: Path, places: Places) -> None:
    """Writes results/KEY.json of what `read_bundle` found; each says from which file it first came."""
    for key, line in found.items():
        result = json.loads(line)
        write_json({**result, "from": result.get("from", source.name)}, places.result(key))
    note_failed(places)


def _lines(source: Path) -> Iterator[str]:
    try:
        left, total = b"", 0
        with source.open("rb") as file:
            for block in _unpacked(iter(lambda: file.read(1 << 16), b"")):
                total += len(block)
                *whole, left = (left + block).split(b"\n")
                if len(left) > LINE or total > TOTAL:
                    raise ValueError(
                        f"{source}: more than {LINE:,} bytes a line or {TOTAL:,} in all; no study's results"
                    )
                yield from (line.decode("utf-8") for line in whole)
        if left:
            raise EOFError("its last line is cut off")
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror or error}") from error
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is no file that `commvlm study --export` wrote: {error}") from error


def _unpacked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Of one xz stream or of several, one after the other."""
    block = next(blocks, b"")
    while block:
        unpacker = cast(Any, lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MEMORY))
        while not unpacker.eof:
            yield unpacker.decompress(block, max_length=1 << 20)
            block = next(blocks, b"") if unpacker.needs_input and not unpacker.eof else b""
            if unpacker.needs_input and not block and not unpacker.eof:
                raise EOFError("it ends too early")
        block = unpacker.unused_data or next(blocks, b"")
