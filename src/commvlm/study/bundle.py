"""A study's results as one file that others can go on from: an xz-compressed line of JSON for every run that is done.

A result is known by its run's key, the hash of all that it depends on, so a grid takes from such a file what it would have
made itself, and nothing else. The file comes from anywhere: it is read as data, within bounds.
"""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

from ..evaluate.receipts import write_json
from .runs import Places
from .tallies import Tally

KEY = re.compile(r"[0-9a-f]{16}")
LINE = 8 << 20
"""Characters of one result at most; one of five tasks on 300 images has 90,000."""
MEMORY = 256 << 20
"""Bytes that unpacking may take."""
FACTS: dict[str, type] = {
    "name": str, "key": str, "seconds": dict, "scores": dict, "tallies": dict, "layer_weights": dict, "losses": list,
    "alignments": dict, "versions": dict,
}  # fmt: skip
"""What every result says, see `worker.work`."""
SCORE = ("metric", "rule", "value", "n", "unparsable")


def pack(places: Places, keys: Collection[str], target: Path) -> int:
    """Writes the results of `keys` that are done; returns how many. The same results give the same bytes.

    Raises ValueError where none is done.
    """
    done = sorted({key for key in keys if places.done(key)})
    if not done:
        raise ValueError(f"{places.root}: no run is done, there is nothing to put into {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with lzma.open(part, "wt", preset=9, encoding="utf-8", newline="\n") as file:
        for key in done:
            result = json.loads(places.result(key).read_text(encoding="utf-8"))
            file.write(json.dumps(result, separators=(",", ":"), sort_keys=True) + "\n")
    os.replace(part, target)
    return len(done)


def unpack(source: Path, keys: Collection[str], places: Places) -> int:
    """Writes results/KEY.json of those `keys` that have none and are in the file; returns how many.

    Raises ValueError naming file and line where it is no such file; nothing is written then.
    """
    taken = {}
    for number, text in enumerate(_lines(source), 1):
        result = _checked(text, f"{source}, line {number}")
        if result["key"] in keys and not places.done(result["key"]):
            taken[result["key"]] = result
    for key, result in taken.items():
        places.result(key).parent.mkdir(parents=True, exist_ok=True)
        write_json(result, places.result(key))
    return len(taken)


def _lines(source: Path) -> Iterator[str]:
    try:
        unpacker = cast(Any, lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MEMORY))
        left = b""
        with source.open("rb") as file:
            while not unpacker.eof:
                given = file.read(1 << 16) if unpacker.needs_input else b""
                if unpacker.needs_input and not given:
                    raise EOFError("it ends too early")
                *whole, left = (left + unpacker.decompress(given, max_length=1 << 20)).split(b"\n")
                if len(left) > LINE:
                    raise ValueError(f"{source}: a line is longer than {LINE:,} bytes; it holds no study's results")
                yield from (line.decode("utf-8") for line in whole)
        if left:
            raise EOFError("its last line is cut off")
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror or error}") from error
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is no file that `commvlm study --export` wrote: {error}") from error


def _checked(text: str, where: str) -> dict[str, Any]:
    """A result whose parts have their types. Raises ValueError with the place."""
    try:
        result = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON of finite numbers") from error
    if not isinstance(result, dict):
        raise ValueError(f"{where}: a result is an object")
    for name, kind in FACTS.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}")
    if not KEY.fullmatch(result["key"]):
        raise ValueError(f"{where}: key {result['key'][:40]!r} is none of a run")
    for part in ("train", "evaluate"):
        if not isinstance(result["seconds"].get(part), int | float):
            raise ValueError(f"{where}: seconds.{part} must be a number")
    for task, said in result["scores"].items():
        if not (isinstance(said, dict) and set(SCORE) <= set(said) and isinstance(said["value"], int | float)):
            raise ValueError(f"{where}: scores.{task} must say {', '.join(SCORE)}")
    for row in result["losses"]:
        if not (isinstance(row, list) and [type(value) for value in row] == [str, int, float]):
            raise ValueError(f"{where}: losses are [stage, step, loss] each, one is {str(row)[:40]}")
    for task, said in result["tallies"].items():
        try:
            made = Tally.from_json(said)
            shape = (len(made.images), len(made.groups))
            if not made.sums.shape == made.counts.shape == shape:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: tallies.{task} has no sums and counts of every image and group") from error
    return result


def _no_number(said: str) -> float:
    raise ValueError(f"{said} is no finite number")
