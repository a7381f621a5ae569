"""The loop of every pretraining: an objective's updates, logged, resumable, on the same path however often it is stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoint import Progress, load_progress, save_progress
from .optim import schedule, step

Learner = TypeVar("Learner", bound=nn.Module)


class Pretraining(Generic[Learner]):
    """An objective: subclasses say its loss, which depends on their budget and an update's number alone.

    budget: a dataclass with `updates` among its settings. model: what learns.
    """

    budget: Any
    model: Learner
    optimizers: list[Optimizer]

    @property
    def state(self) -> nn.Module:
        """All that a stopped run needs in order to go on."""
        return self.model

    def loss(self, update: int) -> tuple[Tensor, dict[str, float]]:
        """(what is minimised, what the log says beside it)."""
        raise NotImplementedError

    def rate(self, update: int) -> float:
        """The learning rates' factor."""
        return schedule(update, total=self.budget.updates)

    def after(self, update: int) -> None:
        """What follows an update."""


def go_on(
    trainer: Pretraining[Any], out: Path, name: str, settings: Mapping[str, Any], *, minutes: float | None
) -> dict[str, Any]:
    """Runs what is left of `trainer` in `out`; returns the settings with the updates done and the seconds of all sessions.

    settings: what a run that is continued must agree with; raises ValueError where it does not.
    """
    progress = Progress(out, name, total=trainer.budget.updates, minutes=minutes)
    start = load_progress(out, trainer.state, trainer.optimizers, settings)
    trainer.model.train()
    for update in progress.updates(start):
        began = time.perf_counter()
        loss, said = trainer.loss(update)
        loss.backward()
        norm = step(trainer.model, trainer.optimizers, trainer.rate(update))
        trainer.after(update)
        progress.log(update, {"loss": loss.item(), **said, "norm": norm, "seconds": time.perf_counter() - began})
        if progress.due():
            save_progress(out, trainer.state, trainer.optimizers, update + 1, settings)
    save_progress(out, trainer.state, trainer.optimizers, progress.done, settings)
    return {**settings, "updates": progress.done, "seconds": progress.spent()}
