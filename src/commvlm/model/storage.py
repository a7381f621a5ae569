"""Files that are whole or not there, and a full disk told as what it is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

SAID = "the disk is full"
"""In every error that is told for want of space."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises OSError, with the folder and the next step, where something in it could not be written for want of space."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_full(error):
            raise
        reason = f"{folder}: {SAID}; free some space and run the same command again"
        raise OSError(errno.ENOSPC, reason) from error


def _is_full(error: Exception) -> bool:
    """safetensors and torch say so in words alone; torch's, from its container's file, are those of any failure to write."""
    if isinstance(error, OSError):
        return error.errno in FULL
    text = str(error)
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in text for number in FULL)
    return "inline_container.cc" in text and "Reader" not in text


def write_text(path: Path, text: str) -> None:
    """The file, under a temporary name first."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def last_row(log: Path) -> dict[str, Any] | None:
    """The last whole line of a log that is being written: a JSON object a line; None where there is none yet."""
    if not log.exists():
        return None
    whole = log.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]
    try:
        return json.loads(whole)
    except json.JSONDecodeError:
        return None
