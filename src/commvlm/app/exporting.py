"""A checkpoint as a folder that needs nothing else: weights, processor, chat template, card, receipts, and code if wanted."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.dialogue import CHAT_TEMPLATE
from ..evaluate.receipts import write_json
from ..model import CommForConditionalGeneration, CommProcessor
from ..model.storage import write_text, writing
from .checkpoint import load_checkpoint, resolve_checkpoint
from .model_card import RECEIPTS, About, find_receipts, model_card
from .remote_code import MODULES, write_code

DTYPES = {"as-is": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Export:
    """name: the model's, in its card. dtype: a row of `DTYPES`. license: the hub's identifier. code: whether the model can be
    loaded without this package, by trust_remote_code=True."""

    name: str
    dtype: str = "as-is"
    license: str | None = None
    code: bool = True


def export(checkpoint: Path, out: Path, wanted: Export) -> Path:
    """Writes the folder `out`, whole or not at all, and returns it. Raises ValueError for what is no checkpoint, for broken
    receipts beside it, and for a folder that exists."""
    if wanted.dtype not in DTYPES:
        raise ValueError(f"there is no dtype {wanted.dtype!r}; valid: {', '.join(DTYPES)}")
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it first")
    folder = resolve_checkpoint(checkpoint)
    run = (
        folder.parent if (folder.parent / "run.json").is_file() else checkpoint
    )  # a demo's run.json names a run's model
    receipts = find_receipts(run)
    model, processor = load_checkpoint(folder)
    saved, dtype = model.dtype, DTYPES[wanted.dtype]
    if dtype is not None:
        model = model.to(dtype)  # type: ignore[assignment]
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with writing(out):
            _write(part, model, processor, wanted.code)
            for task, receipt in receipts.items():
                write_json(receipt, part / RECEIPTS / f"{task}.json")
            about = About(wanted.name, wanted.license, receipts, wanted.code, converted=dtype not in (None, saved))
            write_text(part / "README.md", model_card(model, about))
            os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return out


def _write(folder: Path, model: CommForConditionalGeneration, processor: CommProcessor, code: bool) -> None:
    model.save_pretrained(folder)
    if not processor.chat_template:
        processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    config = _read(folder / "config.json")
    processing = _read(folder / "processor_config.json")
    if code:
        write_code(folder)
        config["auto_map"] = dict(MODULES)
        processing["auto_map"] = processing["image_processor"]["auto_map"] = {
            name: place for name, place in MODULES.items() if "Processor" in name
        }
    write_json(_portable(config), folder / "config.json")
    write_json(_portable(processing), folder / "processor_config.json")


def _portable(value: Any) -> Any:
    """Without where its parts once lay on this machine."""
    if isinstance(value, dict):
        return {name: _portable(inner) for name, inner in value.items() if name != "_name_or_path"}
    return [_portable(inner) for inner in value] if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
