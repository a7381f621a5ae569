"""What is seen and kept of a run while it goes on: a progress bar and log.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """One bar per stage, one JSON line per logging step: stage, step, of, loss, rate, gradient norms, tokens a second, layer
    weights, seconds. In a run of several processes the first one's."""

    def __init__(self, stage: str, log: Path) -> None:
        self.stage, self.log = stage, log
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.began = time.monotonic()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")
        _drop_after(self.log, self.stage, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A logged loss is the mean since the line before, which a resumed run has not seen: so a line at every checkpoint.
        control.should_log = control.should_log or control.should_save
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or self.bar is None:
            return
        seconds = time.monotonic() - self.began
        speed = round(logs["tokens"] / seconds)
        row = {
            "stage": self.stage,
            "step": state.global_step,
            "of": state.max_steps,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "grad_norms": {key.split("/")[1]: norm for key, norm in logs.items() if key.startswith("grad_norm/")},
            "lr": logs.get("learning_rate"),
            "seconds": round(seconds, 2),
            "tokens_per_second": speed,
            "layer_weights": _layer_weights(logs),
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.set_postfix({"loss": f"{logs['loss']:.3f}", "tokens/s": f"{speed:,}"})

    def close(self) -> None:
        """Ends the bar, however the stage ended: what is said next stands below it."""
        if self.bar is not None:
            self.bar.close()


def _layer_weights(logs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Encoder -> layer -> its weight, from "layer_weight/clip/12"."""
    found: dict[str, dict[str, float]] = {}
    for key, weight in logs.items():
        if key.startswith("layer_weight/"):
            _, encoder, layer = key.split("/")
            found.setdefault(encoder, {})[layer] = weight
    return found


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
