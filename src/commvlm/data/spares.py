"""What is trained on instead of a group that cannot be used, and the record of it: nothing is swapped in silence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .example import Example
from .mixture import Mixture
from .order import mixed

LIMIT = 32
"""Groups that may fail in a row before the data as a whole is held to be broken."""


class Spares:
    """Gives another group of the same mixture for one that cannot be used, the same one in every run.

    log: a file of JSON lines, one for each group that was left out: its ids, its image and why. Workers may share it.
    """

    def __init__(self, mixture: Mixture, log: Path) -> None:
        self.mixture = mixture
        self.log = log

    def __call__(self, group: Sequence[Example], error: ValueError, tried: int) -> Sequence[Example]:
        """tried: how many were tried for the same place before. Raises ValueError when LIMIT in a row fail."""
        if tried >= LIMIT:
            raise ValueError(f"{LIMIT} groups in a row cannot be used; the last: {error}") from error
        ids = [example.id for example in group]
        row = {"ids": ids, "image": str(group[0].image), "error": str(error)}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        handle = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            first = os.fstat(handle).st_size == 0
            os.write(handle, line)
        finally:
            os.close(handle)
        if first:
            print(f"left out, another in its place: {error} (all are in {self.log})", file=sys.stderr, flush=True)
        key = int.from_bytes("\0".join(ids).encode()[:4096], "big")
        return self.mixture.spare(mixed(key, tried))
