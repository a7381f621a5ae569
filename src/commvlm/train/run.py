"""Training: the stages of a recipe, one after the other, into one folder; interrupted work resumes."""

from __future__ import annotations

import gc
import json
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..model.modeling import PARTS, CommForConditionalGeneration
from ..model.storage import write_text, writing
from .adapters import Adapters, check_bits
from .assemble import assemble
from .keys import RecipeError, nearest_key
from .parallel import hearing, processes, together
from .parts import check_trained, parts_table, settle_parts
from .recipe import Recipe, Stage, Train, as_yaml, difference, load_recipe
from .sharded import gathered
from .sources import training_examples
from .stage import LEFT_OUT, STOPPED, run_stage, shared_out
from .trainer import checkpoints, discard
from .whole import save_whole

TRACKERS = ("tensorboard", "trackio", "wandb")
SETTLED = "parts.json"
"""In a finished stage's folder, from before its model is there: what it trained, as `parts.settle_parts` said."""


def train(recipe: Recipe, out: Path, *, weights: str = "checkpoint") -> Path:
    """Trains every stage and writes `out`/model, run.json, log.jsonl and recipe.yaml; returns the model's folder.

    A run that was interrupted goes on from its last checkpoint; a finished one is left as it is. weights: see
    `model.build.build_model`. In a process that torchrun (or another launcher) started this is one of several, and `out` a
    folder that all of them see. Raises ValueError for a recipe that does not fit the data, the folder's own recipe or the
    number of processes, OSError when the disk is full, and LostProcess when another process ended.
    """
    first = processes().is_main_process
    with hearing(), together():
        check(recipe, count=processes().num_processes)
    with hearing(), together():
        if first:
            _claim(out, recipe)
    if not (out / "run.json").exists():
        with hearing(), writing(out):
            _train(recipe, out, weights)
    with hearing(), together():
        if first:
            shutil.rmtree(out / "stages", ignore_errors=True)
    return out / "model"


def check(recipe: Recipe, *, count: int = 1) -> None:
    """What can be said before anything is read, for so many processes. Raises RecipeError."""
    if not recipe.train.stages:
        raise RecipeError("train.stages is empty: name at least one stage")
    names = [stage.name for stage in recipe.train.stages]
    if len(set(names)) != len(names):
        raise RecipeError(f"two stages have one name: {', '.join(names)}")
    if min(recipe.train.save_every, recipe.train.log_every, recipe.train.keep) < 1:
        raise RecipeError("train.save_every, log_every and keep must be at least 1")
    check_extras(recipe.train)
    if recipe.train.optimizer == "muon" and recipe.train.engine != "ddp":
        raise RecipeError(f"train.optimizer muon needs whole matrices: engine ddp, not {recipe.train.engine}")
    if recipe.train.engine == "fsdp" and count == 1:
        raise RecipeError(
            "train.engine fsdp shares a model out: ask for several processes (--processes 8), or take ddp"
        )
    for stage in recipe.train.stages:
        _check_stage(stage)
        if recipe.train.features is not None and "encoders" in stage.trains:
            raise RecipeError(
                f"stage {stage.name!r}: encoders cannot learn where train.features is read in their place"
            )
        _check_engine(stage, recipe.train)
        shared_out(stage, count)


def _check_engine(stage: Stage, train: Train) -> None:
    """Raises RecipeError for adapters that an engine would train wrongly, or could not save."""
    lora, again = stage.lora, train.engine == "fsdp" and train.checkpointing
    if not lora.rank:
        return
    if lora.bits == 4 and train.engine != "ddp":
        raise RecipeError(
            f"stage {stage.name!r}: lora.bits 4 is for train.engine ddp: {train.engine} cannot share 4-bit weights out"
        )
    if again and lora.dropout:
        raise RecipeError(
            f"stage {stage.name!r}: lora.dropout with train.engine fsdp and train.checkpointing would draw other masks when "
            "activations are computed again; set lora.dropout 0, or train.checkpointing false"
        )
    if again and "encoders" in lora.parts:
        raise RecipeError(
            f"stage {stage.name!r}: adapters in encoders do not go with train.engine fsdp and train.checkpointing; set "
            "train.checkpointing false, or take ddp"
        )


def check_extras(train: Train) -> None:
    """Raises RecipeError where a package is not there that the recipe asks for, naming the extra."""
    wanted = [(name, "track") for name in train.report_to] + [("deepspeed", "deepspeed")] * train.engine.startswith(
        "zero"
    )
    for name, extra in wanted:
        if extra == "track" and name not in TRACKERS:
            raise RecipeError(f"train.report_to knows no {name!r}{nearest_key(name, TRACKERS)}")
        if find_spec(name) is None:
            raise RecipeError(f"{name} is not installed: pip install 'commvlm[{extra}]'")
    for part in train.compile:
        if part not in PARTS:
            raise RecipeError(f"train.compile names no part {part!r}{nearest_key(part, PARTS)}")


def _check_stage(stage: Stage) -> None:
    if Path(stage.name).name != stage.name or stage.name in ("", ".."):
        raise RecipeError(f"stage {stage.name!r}: its name becomes a folder's; take a plain word")
    micro = stage.batch if stage.micro_batch is None else stage.micro_batch
    if min(stage.steps, stage.batch, micro) < 1 or stage.batch % micro:
        raise RecipeError(f"stage {stage.name!r}: steps and batch must be positive, batch a multiple of micro_batch")
    if not 0 <= stage.warmup <= 1:
        raise RecipeError(f"stage {stage.name!r}: warmup is {stage.warmup}, it is a share of the steps, from 0 to 1")
    if stage.spike is not None and stage.spike <= 1:
        raise RecipeError(f"stage {stage.name!r}: spike is {stage.spike}, it is a multiple of the usual loss, over 1")
    check_trained(stage.trains, stage.lora)
    check_bits(stage.lora.bits if stage.lora.rank else 16)


def _train(recipe: Recipe, out: Path, weights: str) -> None:
    began, first = time.monotonic(), processes().is_main_process
    torch.manual_seed(recipe.train.seed)
    with together():
        if first:
            (out / STOPPED).unlink(missing_ok=True)
        examples = training_examples(recipe.data)
        model, processor = assemble(recipe.model, weights=weights, seed=recipe.train.seed, start=recipe.train.start)
    parts: dict[str, Any] = {}
    for stage in recipe.train.stages:
        folder = out / "stages" / stage.name
        adapters, done = None, (folder / "model").is_dir()
        with together():
            if done:
                parts[stage.name] = _settled(recipe, stage, model, folder)
            else:
                adapters, parts[stage.name] = _settle(recipe, stage, model)
        if first:
            said = parts_table(parts[stage.name])
            print(f"stage {stage.name}: {stage.steps} steps of {stage.batch}\n{said}", flush=True)
        if done:
            model = CommForConditionalGeneration.from_pretrained(folder / "model")
            continue
        trainer = run_stage(recipe, stage, model, processor, examples, folder, log=out / "log.jsonl")
        whole = model
        if recipe.train.engine != "ddp":
            whole = gathered(trainer, adapters)
        elif adapters is not None:
            adapters.merge()
        with together():
            if first:
                write_text(folder / SETTLED, json.dumps(parts[stage.name], indent=1))
                save_whole(folder / "model", whole, None)
                for old in checkpoints(folder):
                    discard(old)
        if whole is not model and (first or stage is not recipe.train.stages[-1]):
            model = CommForConditionalGeneration.from_pretrained(folder / "model")
        del trainer, whole, adapters  # this stage's optimizer and gradients would stay beside the next one's
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    with together():
        if first:
            _finish(recipe, out, model, processor, parts, seconds=time.monotonic() - began)


def _settle(
    recipe: Recipe, stage: Stage, model: CommForConditionalGeneration
) -> tuple[Adapters | None, dict[str, Any]]:
    """The model ready for a stage: its adapters, if it has any, and what is trained."""
    adapters = None
    if stage.lora.rank:
        dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        adapters = Adapters(model, stage.lora, seed=recipe.train.seed, dtype=dtype)
    return adapters, settle_parts(model, stage.trains, stage.lora)


def _settled(recipe: Recipe, stage: Stage, model: CommForConditionalGeneration, folder: Path) -> dict[str, Any]:
    """What a finished stage trained. In a folder from before this was written down it is found on the model before the stage,
    which is of no use afterwards."""
    if (folder / SETTLED).exists():
        return json.loads((folder / SETTLED).read_text(encoding="utf-8"))
    return _settle(recipe, stage, model)[1]


def _finish(
    recipe: Recipe, out: Path, model: CommForConditionalGeneration, processor: Any, parts: dict[str, Any], *, seconds: float
) -> None:  # fmt: skip
    model.model.language_model.set_attn_implementation("sdpa")
    save_whole(out / "model", model, processor)
    facts = {
        "model": "model",
        "seconds": round(seconds, 1),
        "processes": processes().num_processes,
        "parts": parts[recipe.train.stages[-1].name],
        "stages": parts,
        "layer_weights": model.layer_weights(),
        "images": recipe.data.pixels,
        "left_out": len(set((out / LEFT_OUT).read_text().splitlines())) if (out / LEFT_OUT).exists() else 0,
    }
    write_text(out / "run.json", json.dumps(facts, indent=1))


def _claim(out: Path, recipe: Recipe) -> None:
    """Makes the folder this recipe's. Raises RecipeError where it belongs to another one, naming what differs."""
    kept = out / "recipe.yaml"
    if kept.exists():
        said = difference(load_recipe(kept), recipe)
        if said:
            raise RecipeError(f"{out} was made with another recipe ({said}); choose another --out")
        return
    if out.exists() and any(p.name != "recipe.part" for p in out.iterdir()):
        raise RecipeError(f"{out} is not empty and holds no run of ours; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(kept, as_yaml(recipe))
