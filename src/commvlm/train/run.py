"""Training: the stages of a recipe, one after the other, into one folder; interrupted work resumes."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.collate import Collator
from ..data.example import Example
from ..data.spares import Spares
from ..model.attention import NAME as SHARED_PREFIX
from ..model.modeling import CommForConditionalGeneration
from ..model.processing import CommProcessor
from ..model.storage import write_text, writing
from ..model.stored_pixels import stored_pixels
from .assemble import assemble
from .calibrate import scale_visual_tokens
from .callbacks import Watch
from .keys import RecipeError
from .recipe import Recipe, Stage, as_yaml, load_recipe
from .sources import stage_mixture, training_examples
from .trainer import StageTrainer, check_trained, checkpoints, parts_table, settle_parts
from .whole import save_whole

LEFT_OUT = "left_out.jsonl"
"""Groups that could not be used, with data.faults skip; others were trained on in their place."""
MEASURED = 8
"""Rows of the first batch on which the visual tokens' size is measured, however the batch is cut up."""


def train(recipe: Recipe, out: Path, *, weights: str = "checkpoint") -> Path:
    """Trains every stage and writes `out`/model, run.json, log.jsonl and recipe.yaml; returns the model's folder.

    A run that was interrupted goes on from its last checkpoint; a finished one is left as it is. weights: see
    `model.build.build_model`. Raises ValueError for a recipe that does not fit the data or the folder's own recipe, and
    OSError when the disk is full.
    """
    check(recipe)
    _claim(out, recipe)
    if not (out / "run.json").exists():
        with writing(out):
            _train(recipe, out, weights)
    shutil.rmtree(out / "stages", ignore_errors=True)
    return out / "model"


def check(recipe: Recipe) -> None:
    """What can be said before anything is read. Raises RecipeError."""
    if not recipe.train.stages:
        raise RecipeError("train.stages is empty: name at least one stage")
    names = [stage.name for stage in recipe.train.stages]
    if len(set(names)) != len(names):
        raise RecipeError(f"two stages have one name: {', '.join(names)}")
    if recipe.train.attention == SHARED_PREFIX and recipe.data.group < 2:
        raise RecipeError("train.attention shared-prefix needs data.group > 1")
    if min(recipe.train.save_every, recipe.train.log_every, recipe.train.keep) < 1:
        raise RecipeError("train.save_every, log_every and keep must be at least 1")
    for stage in recipe.train.stages:
        _check_stage(stage)


def _check_stage(stage: Stage) -> None:
    if Path(stage.name).name != stage.name or stage.name in ("", ".."):
        raise RecipeError(f"stage {stage.name!r}: its name becomes a folder's; take a plain word")
    micro = _micro_batch(stage)
    if min(stage.steps, stage.batch, micro) < 1 or stage.batch % micro:
        raise RecipeError(f"stage {stage.name!r}: steps and batch must be positive, batch a multiple of micro_batch")
    if not 0 <= stage.warmup <= 1:
        raise RecipeError(f"stage {stage.name!r}: warmup is {stage.warmup}, it is a share of the steps, from 0 to 1")
    check_trained(stage.trains)


def _micro_batch(stage: Stage) -> int:
    return stage.batch if stage.micro_batch is None else stage.micro_batch


def _train(recipe: Recipe, out: Path, weights: str) -> None:
    began = time.monotonic()
    torch.manual_seed(recipe.train.seed)
    examples = training_examples(recipe.data)
    model, processor = assemble(recipe.model, weights=weights, seed=recipe.train.seed)
    parts: dict[str, Any] = {}
    for stage in recipe.train.stages:
        folder = out / "stages" / stage.name
        parts[stage.name] = settle_parts(model, stage.trains)
        print(f"stage {stage.name}: {stage.steps} steps of {stage.batch}\n{parts_table(parts[stage.name])}", flush=True)
        if (folder / "model").is_dir():
            model = CommForConditionalGeneration.from_pretrained(folder / "model")
            continue
        run_stage(recipe, stage, model, processor, examples, folder, log=out / "log.jsonl")
        save_whole(folder / "model", model, None)
        for old in checkpoints(folder):
            shutil.rmtree(old)
    model.model.language_model.set_attn_implementation("sdpa")
    save_whole(out / "model", model, processor)
    facts = {
        "model": "model",
        "seconds": round(time.monotonic() - began, 1),
        "parts": parts[recipe.train.stages[-1].name],
        "stages": parts,
        "layer_weights": model.layer_weights(),
        "images": recipe.data.pixels,
        "left_out": len((out / LEFT_OUT).read_text().splitlines()) if (out / LEFT_OUT).exists() else 0,
    }
    write_text(out / "run.json", json.dumps(facts, indent=1))


def run_stage(
    recipe: Recipe, stage: Stage, model: CommForConditionalGeneration, processor: CommProcessor,
    examples: Mapping[str, Sequence[Example]], folder: Path, *, log: Path,
) -> None:  # fmt: skip
    """One stage, from its last whole checkpoint in `folder` if there is one; the model is trained in place."""
    train = recipe.train
    number = recipe.train.stages.index(stage)
    mixture = stage_mixture(stage, recipe.data, examples, seed=train.seed + number)
    model.model.language_model.set_attn_implementation(train.attention)
    images: Any = processor.image_processor
    shown = images if train.features is None else stored_pixels(Path(train.features), model.model.vision_tower, images)
    collator = Collator(
        processor.tokenizer,
        shown,
        model.config.num_image_tokens,
        max_length=train.max_length,
        layout="blocks" if train.attention == SHARED_PREFIX else "mask",
        geometry=images.geometry,
        pixels=recipe.data.pixels,
        spare=None if recipe.data.faults == "refuse" else Spares(mixture, log.with_name(LEFT_OUT)),
    )
    micro = _micro_batch(stage)
    found = checkpoints(folder)
    if number == 0 and train.visual_scale is not None and not found:
        first = collator([mixture[index] for index in range(min(stage.batch, MEASURED))])
        if "pixel_values" in first:
            scale_visual_tokens(model, first["pixel_values"], scale=train.visual_scale)
    cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch // micro,
        learning_rate=max(stage.trains.values()),
        lr_scheduler_type=stage.schedule,
        warmup_steps=math.ceil(stage.warmup * stage.steps),
        max_grad_norm=stage.clip,
        bf16=train.precision == "bf16",
        use_cpu=cpu,
        seed=train.seed,
        logging_steps=train.log_every,
        save_steps=train.save_every,
        save_total_limit=train.keep,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        dataloader_num_workers=recipe.data.workers,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    watch = Watch(stage.name, log, model)
    trainer = StageTrainer(
        model=model, args=arguments, train_dataset=mixture, data_collator=collator,  # type: ignore[arg-type]
        trains=stage.trains, decay=stage.decay, callbacks=[watch],
    )  # fmt: skip
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    model.train()
    try:
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    finally:
        watch.close()
    model.eval()


def _claim(out: Path, recipe: Recipe) -> None:
    """Makes the folder this recipe's. Raises RecipeError where it belongs to another one, naming what differs."""
    kept = out / "recipe.yaml"
    if kept.exists():
        was = load_recipe(kept)
        if was != recipe:
            raise RecipeError(f"{out} was made with another recipe ({difference(was, recipe)}); choose another --out")
        return
    if out.exists() and any(p.name != "recipe.part" for p in out.iterdir()):
        raise RecipeError(f"{out} is not empty and holds no run of ours; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(kept, as_yaml(recipe))


def difference(was: Any, now: Any, prefix: str = "") -> str:
    """The first key in which two recipes differ, with both values."""
    import dataclasses

    for field in dataclasses.fields(was):
        a, b = getattr(was, field.name), getattr(now, field.name)
        if a != b and dataclasses.is_dataclass(a):
            return difference(a, b, f"{prefix}{field.name}.")
        if a != b:
            return f"{prefix}{field.name}: {a!r} there, {b!r} now"[:300]
    return "no difference"
