"""A thin layer on the library's Trainer: data in the mixture's order, a rate per part, checkpoints that are whole."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils.data import SequentialSampler
from transformers import Trainer

from ..data.mixture import Mixture
from ..model.modeling import CommForConditionalGeneration
from ..model.storage import write_text, writing
from ..model.vision import by_batch
from . import sharded
from .adapters import load_trained, save_trained
from .imageless import STAND_IN
from .optimizers import optimizer_of, words_of
from .parallel import processes, together
from .whole import flush


class Diverged(ValueError):
    """A loss that is no number, or far from those before: the run stops before it changes a weight."""


class StageTrainer(Trainer):
    """The library's Trainer for one stage.

    The dataset's order is the training order (it is already drawn from a seed), shared out over the processes batch by
    batch. Each part has its rate. A checkpoint is written under a temporary name and renamed when it is whole.

    method: `recipe.Train.optimizer`. trains: part -> rate. decay, spike: see `recipe.Stage`. batch: groups of one update.
    stopped: the file that says what a diverged step was made of. adapted: the model has adapters, and a checkpoint holds
    what is trained alone.
    """

    model: CommForConditionalGeneration

    def __init__(
        self, *args: Any, method: str, trains: Mapping[str, float], decay: float, spike: float | None, batch: int,
        stopped: Path, adapted: bool, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.trains, self.decay, self.spike, self.batch, self.stopped = dict(trains), decay, spike, batch, stopped
        self.method, self.adapted = method, adapted
        self._step_loss: Any = 0.0
        self._tokens = 0
        self._norms: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            sharded.settle_state(self)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `method` says, one rate per part; decay on matrices only."""
        if self.optimizer is None:
            words = words_of(self.model)
            self.optimizer = optimizer_of(self.method, self._trained(), self.trains, decay=self.decay, words=words)
        return self.optimizer

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of every part that is trained; together all that have a gradient."""
        found = {
            part: [p for p in module.parameters() if p.requires_grad]
            for part, module in self.model.parts().items()
            if part in self.trains
        }
        named = {id(p) for parameters in found.values() for p in parameters}
        loose = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in named]
        if loose:
            raise RuntimeError(f"{loose[0]} would be trained, but trains does not name its part")
        return found

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.args.fsdp:
            sharded.check_sharded(self.model)
        return prepared

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._tokens += inputs["input_ids"].numel()
        number = (
            None if num_items_in_batch is None else int(num_items_in_batch)
        )  # FSDP would round a tensor to bfloat16
        quiet = by_batch(self.model.model.vision_tower) if inputs.pop(STAND_IN, False) else nullcontext()
        with quiet:
            loss = super().training_step(model, inputs, number)  # type: ignore[arg-type]
        self._step_loss = self._step_loss + loss
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the library, after a look at what is to be stepped on."""
        step, every = self.state.global_step + 1, (int(self.args.logging_steps), int(self.args.save_steps))
        if step == self.state.max_steps or any(step % each == 0 for each in every):
            self._norms = {part: _norm(parameters) for part, parameters in self._trained().items()}
        loss = float(self.accelerator.reduce(self._step_loss, "mean"))  # type: ignore[arg-type]
        self._step_loss = 0.0
        norm = super()._clip_grad_norm(model)
        self._check(step, loss, math.nan if norm is None else float(norm))
        return norm

    def _check(self, step: int, loss: float, norm: float) -> None:
        """Raises Diverged, before the step is taken, with the ids of its examples in `stopped`."""
        usual = self.state.log_history[-1]["loss"] if self.state.log_history else None
        wild = self.spike is not None and usual is not None and loss > self.spike * usual
        if math.isfinite(loss) and (math.isfinite(norm) or self.is_deepspeed_enabled) and not wild:
            return
        with together():
            if not processes().is_main_process:
                return
            mixture: Mixture = self.train_dataset  # type: ignore[assignment]
            places = range((step - 1) * self.batch, step * self.batch)
            ids = [example.id for place in places for example in mixture[place]]
            row = {"step": step, "loss": loss, "grad_norm": norm, "mean_loss_before": usual, "ids": ids}
            write_text(self.stopped, json.dumps(row, indent=1))
            far = f", {loss / usual:.1f} times the mean before" if wild and usual else ""
            raise Diverged(
                f"step {step}: the loss is {loss:.4g}{far}, the gradient's norm {norm:.4g}; no weight was changed by it; "
                f"the ids of its examples are in {self.stopped}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With each part's gradient norm, the layer weights, and tokens (padding included) of all processes so far."""
        if "loss" in logs:
            tokens = torch.tensor(self._tokens, device=self.args.device)
            logs["tokens"] = int(self.accelerator.reduce(tokens, "sum"))  # type: ignore[arg-type]
            logs |= {f"grad_norm/{part}": norm for part, norm in self._norms.items()}
            for encoder, weights in sharded.layer_weights(self.model).items():
                logs |= {f"layer_weight/{encoder}/{layer}": weight for layer, weight in weights.items()}
        super().log(logs, start_time)
        self.state.log_history = self.state.log_history[-1:]  # log.jsonl has them all

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = Path(self.args.output_dir)  # type: ignore[arg-type]
        part, name, first = final / "part", f"checkpoint-{self.state.global_step}", processes().is_main_process
        with together():
            if first:
                shutil.rmtree(part, ignore_errors=True)
        self.args.output_dir = str(part)
        try:
            with together(), writing(final):
                super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = str(final)
        with together():
            if first:
                flush(part / name)
                shutil.rmtree(final / name, ignore_errors=True)
                os.replace(part / name, final / name)
                shutil.rmtree(part)
                for old in checkpoints(final)[: -(self.args.save_total_limit or 0) or None]:
                    discard(old)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.adapted:
            super()._save(output_dir, state_dict)
        elif self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_trained(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapted and not self.is_fsdp_enabled:
            load_trained(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def _norm(parameters: list[nn.Parameter]) -> float:
    norm: Any = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(sharded.whole(norm))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def discard(checkpoint: Path) -> None:
    """Takes a checkpoint away, first as a whole: half of one is not to be seen."""
    gone = checkpoint.with_name("gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)
