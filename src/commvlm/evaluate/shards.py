"""Several ranks, one file of predictions: each appends to a file of its own, the last one to finish puts them together.

    predictions.jsonl.partial            of one process alone
    predictions.jsonl.partial-1-of-4     of rank 1 of 4

No process talks to another; what is finished is seen from the files. Whatever the ranks of an earlier call have written
counts, however many they were.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .predictions import partial_path, read_unfinished

PATIENCE = 1800.0
"""Seconds without a new byte from any rank until waiting for it is given up."""
POLL = 0.2


@dataclass(frozen=True)
class Shard:
    """rank: from 0; ranks: how many there are."""

    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank {self.rank} of {self.ranks} cannot be: ranks count from 0 to {self.ranks - 1}")


ALONE = Shard()


def shard_path(path: Path, shard: Shard) -> Path:
    """Where a rank appends."""
    partial = partial_path(path)
    return partial if shard.ranks == 1 else partial.with_name(f"{partial.name}-{shard.rank}-of-{shard.ranks}")


def shard_paths(path: Path) -> list[Path]:
    """The unfinished files that there are, whoever wrote them."""
    partial = partial_path(path)
    several = sorted(path.parent.glob(f"{partial.name}-*-of-*"))
    return [*([partial] if partial.exists() else []), *several]


def move_aside(path: Path) -> None:
    """A finished file becomes an unfinished one, because more is asked now; another rank may have done so."""
    with suppress(FileNotFoundError):
        os.replace(path, partial_path(path))


def gather(path: Path, order: Sequence[tuple[str, str]], shard: Shard, *, patience: float = PATIENCE) -> Path:
    """Waits until every example of `order` has its line somewhere, and makes them `path`, in that order.

    Raises ValueError, with the first example that lacks, when no file has grown for `patience` seconds.
    """
    size, since, lines = -1, time.monotonic(), dict[tuple[str, str], bytes]()
    while not path.exists():
        started = time.monotonic()
        try:
            files = shard_paths(path)
            now = sum(file.stat().st_size for file in files)
            if now != size:
                size, since = now, started
                lines = {(r.task, r.id): line for file in files for r, line in read_unfinished(file)}
        except FileNotFoundError:  # put together by another rank this moment
            continue
        lacking = next((key for key in order if key not in lines), None)
        if lacking is None:
            _put_together(path, [lines[key] for key in order], files, shard)
        elif time.monotonic() - since > patience:
            raise ValueError(
                f"{path}: the answer to {' '.join(lacking)} does not come, another rank has stopped; "
                "run the same command again"
            )
        else:
            time.sleep(max(POLL, 10 * (time.monotonic() - started)))
    return path


def _put_together(path: Path, lines: Sequence[bytes], files: Sequence[Path], shard: Shard) -> None:
    """Two ranks may do so at once: both write the same bytes, and the second replacement changes nothing."""
    if len(files) == 1:
        os.replace(files[0], path)
        return
    temporary = path.with_name(f"{path.name}.tmp-{shard.rank}")
    with temporary.open("wb") as stream:
        stream.write(b"".join(line + b"\n" for line in lines))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    for file in files:
        file.unlink(missing_ok=True)
