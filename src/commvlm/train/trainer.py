"""A thin layer on the library's Trainer: data in the mixture's order, a rate per part, checkpoints that are whole."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer

from ..model.modeling import CommForConditionalGeneration
from .keys import RecipeError, nearest_key

TRAINABLE = ("merge", "align", "project", "language_model")


def check_trained(trains: Mapping[str, float]) -> None:
    """Raises RecipeError for a part that there is not, naming the nearest one, and for a rate that is none."""
    for part, rate in trains.items():
        if part not in TRAINABLE:
            raise RecipeError(f"trains names no part {part!r}{nearest_key(part, TRAINABLE)}")
        if not (math.isfinite(rate) and rate >= 0):
            raise RecipeError(f"trains gives part {part!r} the rate {rate}; it must be a number from 0")


def settle_parts(model: CommForConditionalGeneration, trains: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Freezes what a stage does not name, and says so: part -> {parameters, trained, lr}.

    The only place that decides what is trained. Raises RecipeError for a part that there is not, and when nothing is left
    to train.
    """
    check_trained(trains)
    report = {}
    for part, module in model.parts().items():
        rate = trains.get(part)
        module.requires_grad_(rate is not None)
        parameters = list(module.parameters())
        total = sum(p.numel() for p in parameters)
        report[part] = {"parameters": total, "trained": total if rate is not None else 0, "lr": rate}
    if not any(row["trained"] for row in report.values()):
        raise RecipeError("nothing is trained: name at least one part with parameters and its rate in trains")
    return report


def parts_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """What is trained and what is frozen, for people."""
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}{'rate':>12}"]
    for part, row in report.items():
        rate = "frozen" if row["lr"] is None else f"{row['lr']:.1e}"
        lines.append(f"{part:<16}{row['parameters']:>16,}{row['trained']:>16,}{rate:>12}")
    return "\n".join(lines)


class StageTrainer(Trainer):
    """The library's Trainer for one stage.

    The dataset's order is the training order (it is already drawn from a seed). Each part has its rate. A checkpoint is
    written under a temporary name and renamed when it is whole.
    """

    model: CommForConditionalGeneration

    def __init__(self, *args: Any, trains: Mapping[str, float], decay: float, **kwargs: Any) -> None:
        self.trains = dict(trains)
        self.decay = decay
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group per part; decay on matrices only."""
        if self.optimizer is None:
            groups = []
            for part, module in self.model.parts().items():
                if part not in self.trains:
                    continue
                parameters = list(module.parameters())
                for decay, chosen in (
                    (self.decay, [p for p in parameters if p.ndim > 1]),
                    (0.0, [p for p in parameters if p.ndim <= 1]),
                ):
                    if chosen:
                        groups.append({"params": chosen, "lr": self.trains[part], "weight_decay": decay, "part": part})
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        return self.optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(self.args.output_dir)  # type: ignore[arg-type]
        part = final / "part"
        shutil.rmtree(part, ignore_errors=True)
        name = f"checkpoint-{self.state.global_step}"
        self.args.output_dir = str(part)
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = str(final)
        shutil.rmtree(final / name, ignore_errors=True)
        os.replace(part / name, final / name)
        part.rmdir()
        for old in checkpoints(final)[: -(self.args.save_total_limit or 0) or None]:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))
