"""Model folders that are whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..model.modeling import CommForConditionalGeneration
from ..model.processing import CommProcessor
from ..model.storage import writing


def save_whole(folder: Path, model: CommForConditionalGeneration, processor: CommProcessor | None) -> None:
    """The model's folder, under a temporary name first. Raises OSError when the disk is full."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with writing(folder):
            model.save_pretrained(part)
            if processor is not None:
                processor.save_pretrained(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    flush(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def flush(folder: Path) -> None:
    """Everything in the folder on the disk itself, so that a machine that dies leaves no empty files under good names."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
