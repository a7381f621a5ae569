"""One stage of a recipe, on the library's Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.utils.import_utils import is_flash_attn_2_available

from ..data.collate import Collator
from ..data.dialogue import image_id_of
from ..data.example import Example
from ..data.mixture import Mixture
from ..data.spares import Spares
from ..model.attention import available, packs
from ..model.modeling import CommForConditionalGeneration
from ..model.processing import CommProcessor
from ..model.stored_pixels import StoredPixels, stored_pixels
from .calibrate import scale_visual_tokens
from .callbacks import Watch
from .imageless import EveryBranch
from .keys import RecipeError
from .parallel import processes, together
from .recipe import Recipe, Stage, Train
from .sharded import fsdp_config
from .sources import stage_mixture
from .trainer import StageTrainer, checkpoints

LEFT_OUT = "left_out.jsonl"
"""Groups that could not be used, with data.faults skip; others were trained on in their place."""
STOPPED = "stopped.json"
"""The step at which a run stopped by itself, and the ids of its examples."""
MEASURED = 8
"""Rows of the first batch on which the visual tokens' size is measured, however the batch is cut up."""


def run_stage(
    recipe: Recipe, stage: Stage, model: CommForConditionalGeneration, processor: CommProcessor,
    examples: Mapping[str, Sequence[Example]], folder: Path, *, log: Path,
) -> StageTrainer:  # fmt: skip
    """One stage, from its last whole checkpoint in `folder` if there is one; the model is trained in place."""
    found = checkpoints(folder)
    watch = Watch(stage.name, log)
    # The library's own choice is the stage's folder, which goes when the run is done.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log.with_name("tensorboard") / stage.name)
    with together():
        mixture = stage_mixture(stage, recipe.data, examples, seed=recipe.train.seed + recipe.train.stages.index(stage))
        model.model.language_model.set_attn_implementation(attention(recipe))
        collator = _collator(recipe, model, processor, mixture, log)
        if not found or stage.lora.rank:  # a checkpoint of adapters holds what is trained alone
            _scale(recipe, stage, model, mixture, collator)
        trainer = StageTrainer(
            model=model, args=arguments(recipe, stage, model, folder), train_dataset=mixture,  # type: ignore[arg-type]
            data_collator=every_branch(collator, processor),  # type: ignore[arg-type]
            method=recipe.train.optimizer, trains=stage.trains, decay=stage.decay, spike=stage.spike, batch=stage.batch,
            stopped=log.with_name(STOPPED), adapted=stage.lora.rank > 0, callbacks=[watch],
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    vars(model.config).pop("use_cache", None)  # the Trainer's doing; a config that was loaded again would lack it
    model.train()
    for part in recipe.train.compile:
        for module in compiled(model, part):
            module.compile(dynamic=True)
    try:
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    finally:
        watch.close()
    model.eval()
    return trainer


def _collator(
    recipe: Recipe, model: CommForConditionalGeneration, processor: CommProcessor, mixture: Mixture, log: Path
) -> Collator:
    train, images = recipe.train, processor.image_processor
    shown: Any = images
    if train.features is not None:
        shown = stored_pixels(Path(train.features), model.model.vision_tower, images)
    return Collator(
        processor.tokenizer,
        shown,
        model.config.num_image_tokens,
        max_length=train.max_length,
        layout="joined" if packs(train.attention) else "mask",
        geometry=images.geometry,
        pixels=recipe.data.pixels,
        spare=None if recipe.data.faults == "refuse" else Spares(mixture, log.with_name(LEFT_OUT)),
    )


def _scale(
    recipe: Recipe, stage: Stage, model: CommForConditionalGeneration, mixture: Mixture, collator: Collator
) -> None:
    """`train.visual_scale`, before a run's first stage."""
    scale = recipe.train.visual_scale
    if scale is None or recipe.train.start or recipe.train.stages[0] != stage:
        return
    first = collator([mixture[index] for index in range(min(stage.batch, MEASURED))])
    if "pixel_values" in first:
        scale_visual_tokens(model, first["pixel_values"], scale=scale)


def every_branch(collator: Collator, processor: CommProcessor) -> EveryBranch:
    """Its stand-in for an image is read as images are: pixels by the encoders, or features in their place."""
    shown = collator.image_processor
    if isinstance(shown, StoredPixels):
        pixels = shown.blank()
    else:
        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        pixels = processor.image_processor(images=[grey], return_tensors="pt")["pixel_values"]
    return EveryBranch(collator, image_id_of(processor.tokenizer), pixels)


def arguments(recipe: Recipe, stage: Stage, model: CommForConditionalGeneration, folder: Path) -> TrainingArguments:
    """A stage in the words of the library's Trainer, on one device: left alone it takes all GPUs that a process sees, and as
    many times the images an update."""
    train, cpu = recipe.train, not torch.cuda.is_available()
    micro, accumulated = shared_out(stage, processes().num_processes)
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        learning_rate=max(stage.trains.values()),
        # The library's own "constant" knows no warmup.
        lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        warmup_steps=math.ceil(stage.warmup * stage.steps),
        max_grad_norm=stage.clip or math.inf,
        bf16=train.precision == "bf16",
        use_cpu=cpu,
        seed=train.seed,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_steps=train.save_every,
        save_total_limit=train.keep,
        ddp_find_unused_parameters=False,  # every branch has a part in every batch: see `imageless`
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        dataloader_num_workers=recipe.data.workers,
        disable_tqdm=True,
        report_to=train.report_to,
        project="commvlm",
        run_name=f"{recipe.name}-{folder.parent.parent.name}-{stage.name}",
        log_level="error",
        **engine(train, model),
    )
    made._n_gpu = min(made.n_gpu, 1)
    return made


def engine(train: Train, model: CommForConditionalGeneration) -> dict[str, Any]:
    """What the Trainer is told about sharing a model out, and about what is computed again."""
    if train.engine == "fsdp":  # computes again by itself, without a second gathering of the weights
        return {"fsdp": True, "fsdp_config": fsdp_config(model, checkpointing=train.checkpointing)}
    again: dict[str, Any] = {"activation_checkpointing": train.checkpointing}
    if train.engine.startswith("zero"):
        again["deepspeed"] = str(resources.files("commvlm") / "train" / "deepspeed" / f"{train.engine}.json")
    return again


def attention(recipe: Recipe) -> str:
    """The language model's attention by its name in the library. Raises RecipeError where its package is not there."""
    asked = recipe.train.attention
    flash = is_flash_attn_2_available()
    if asked == "auto":
        return "flash_attention_2" if flash and recipe.data.group == 1 else "sdpa"
    if asked == "flash_attention_2" and not flash:
        raise RecipeError("train.attention flash_attention_2 needs a GPU and flash-attn: pip install 'commvlm[gpu]'")
    return available(asked)


def compiled(model: CommForConditionalGeneration, part: str) -> list[nn.Module]:
    """The modules of a part that are compiled, each in its place, so that names of weights stay: a transformer's blocks,
    which are alike and share what is compiled, or else what the part consists of."""
    blocks = [m for m in model.parts()[part].modules() if type(m).__name__ in (model._no_split_modules or ())]
    return blocks or [m for m in model.parts()[part].children() if any(True for _ in m.parameters())]


def shared_out(stage: Stage, count: int) -> tuple[int, int]:
    """A batch over `count` processes: groups at once on each (at most the stage's micro_batch), and how many times.

    Raises RecipeError where the batch cannot be shared out evenly.
    """
    share, rest = divmod(stage.batch, count)
    if rest or not share:
        raise RecipeError(f"stage {stage.name!r}: batch {stage.batch} cannot be shared by {count} processes evenly")
    most = share if stage.micro_batch is None else min(stage.micro_batch, share)
    micro = next(size for size in range(most, 0, -1) if share % size == 0)
    return micro, share // micro
