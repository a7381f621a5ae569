"""Progress, log and resume of a pretraining run: one folder, written atomically, deterministic to continue."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn
from transformers import PreTrainedModel


def save_progress(out: Path, model: nn.Module, optimizers: list, update: int, settings: Mapping[str, Any]) -> None:
    """The whole state after `update` updates, under a temporary name first."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        "update": update,
        "settings": dict(settings),
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }
    part = out / f"progress.part{os.getpid()}"
    torch.save(state, part)
    os.replace(part, out / "progress.pt")


def load_progress(out: Path, model: nn.Module, optimizers: list, settings: Mapping[str, Any]) -> int:
    """Restores the state that `save_progress` wrote, if any, and returns the number of updates done.

    Raises ValueError where the folder's run had other settings. The file is our own; it is read with weights_only.
    """
    path = out / "progress.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    was = state["settings"]
    changed = [k for k in settings if was.get(k) != settings[k]]
    if changed:
        raise ValueError(
            f"{path}: made with {changed[0]}={was.get(changed[0])!r}, not {settings[changed[0]]!r}; choose another folder"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["update"]


class Progress:
    """Counts updates with a bar, a JSONL log every 20, a checkpoint every minute, and an optional limit in minutes."""

    def __init__(self, out: Path, name: str, *, total: int, minutes: float | None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.name, self.total = out / "log.jsonl", name, total
        self.limit = None if minutes is None else 60 * minutes
        self.begin = self.saved = time.monotonic()
        self.done = 0
        self._sums: dict[str, float] = {}
        self._count = 0
        self._before = self._seconds_before()

    def _seconds_before(self) -> float:
        if not self.path.exists():
            return 0.0
        lines = self.path.read_text().splitlines()
        return json.loads(lines[-1])["spent"] if lines else 0.0

    def spent(self) -> float:
        """Seconds over all sessions of this run."""
        return self._before + time.monotonic() - self.begin

    def updates(self, start: int) -> Iterator[int]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.done = start
        with Bar(*columns) as bar:
            task = bar.add_task(self.name, total=self.total, completed=start)
            for update in range(start, self.total):
                if self.limit is not None and time.monotonic() - self.begin > self.limit:
                    return
                yield update
                self.done = update + 1
                bar.update(task, completed=update + 1)

    def log(self, update: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1
        if (update + 1) % 20 == 0:
            row = {"update": update + 1, "spent": round(self.spent(), 1)}
            row |= {k: round(v / self._count, 5) for k, v in self._sums.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._sums, self._count = {}, 0

    def due(self) -> bool:
        if time.monotonic() - self.saved < 60:
            return False
        self.saved = time.monotonic()
        return True


def export(model: PreTrainedModel, out: Path, facts: Mapping[str, Any], tokenizer: Any = None) -> Path:
    """The model as a plain bfloat16 safetensors checkpoint in `out`/model, with the facts of its pretraining beside it."""
    folder = out / "model"
    small = copy.deepcopy(model).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    small.set_attn_implementation("sdpa")
    small.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps(dict(facts), indent=1))
    return folder
