"""What is seen and kept of a run while it goes on: a progress bar and log.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ..model.modeling import CommForConditionalGeneration


class Watch(TrainerCallback):
    """One bar per stage, one JSON line per logging step: stage, step, of, loss, rates, layer weights, seconds."""

    def __init__(self, stage: str, log: Path, model: CommForConditionalGeneration) -> None:
        self.stage, self.log, self.model = stage, log, model
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")
        _drop_after(self.log, self.stage, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A logged loss is the mean since the line before, which a resumed run has not seen: so a line at every checkpoint.
        control.should_log = control.should_log or control.should_save
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        row = {
            "stage": self.stage,
            "step": state.global_step,
            "of": state.max_steps,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "lr": logs.get("learning_rate"),
            "seconds": round(time.monotonic() - self.began, 2),
            "layer_weights": self.model.layer_weights(),
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def close(self) -> None:
        """Ends the bar, however the stage ended: what is said next stands below it."""
        if self.bar is not None:
            self.bar.close()


def _drop_after(log: Path, stage: str, step: int) -> None:
    """Forgets the lines that a killed run wrote beyond its last checkpoint."""
    if not log.exists():
        return
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the torn last line of a killed run
        if row["stage"] != stage or row["step"] <= step:
            rows.append(line + "\n")
    part = log.with_suffix(".part")
    part.write_text("".join(rows), encoding="utf-8")
    part.replace(log)
