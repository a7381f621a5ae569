"""`commvlm plan` held against training steps that run: the most memory that a process holds, planned and measured.

    python benchmarks/plan.py                 # three sizes, each measured in processes of its own; minutes on one core
    python benchmarks/plan.py --case middle --how live

A case is a whole training update on this CPU, twice, through the stage's own Trainer: two encoders, merges, projection and a
language model with random weights, packed rows, gradients, clipping, AdamW. Measured are the live tensors ("live": counted
one by one) and the process's resident memory beyond what it was before the model was made ("rss": the kernel's own peak).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, Qwen3Config, TrainingArguments

from commvlm.app.planning import Planner, Text, machine
from commvlm.model.build import build_model
from commvlm.model.memory import live_bytes
from commvlm.train.assemble import model_settings
from commvlm.train.parts import settle_parts
from commvlm.train.recipe import Data, Encoder, Model, Recipe, Stage, Train
from commvlm.train.trainer import StageTrainer

TEXT = Text(front=40, words=60, answer=20)
PARTS = ("merge", "align", "project", "language_model")


@dataclasses.dataclass(frozen=True)
class Case:
    """width, layers: of the language model. images: of an update; micro: at once. group: questions an image."""

    family: str
    width: int
    layers: int
    images: int
    micro: int
    group: int
    precision: str = "fp32"
    checkpointing: bool = False
    trains: tuple[str, ...] = PARTS


CASES = {
    "small": Case("llama", 256, 8, images=4, micro=4, group=5),
    "middle": Case("qwen3", 512, 12, images=4, micro=2, group=1, precision="bf16"),
    "large": Case("llama", 768, 16, images=2, micro=2, group=5, checkpointing=True),
}


def recipe_of(case: Case, folder: Path) -> Recipe:
    """The case as a recipe, its parts' configs in `folder`."""
    vision: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 336,
        "patch_size": 14,
    }
    CLIPVisionConfig(**vision, intermediate_size=1024).save_pretrained(folder / "clip")
    Dinov2Config(**vision).save_pretrained(folder / "dinov2")
    text: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": case.width, "intermediate_size": round(2.75 * case.width), 
        "num_attention_heads": case.width // 64,
        "num_hidden_layers": case.layers, "tie_word_embeddings": False,
    }  # fmt: skip
    if case.family == "llama":
        LlamaConfig(**text).save_pretrained(folder / "lm")
    else:
        Qwen3Config(**text, num_key_value_heads=case.width // 128, head_dim=64).save_pretrained(folder / "lm")
    encoders = [
        Encoder("clip", str(folder / "clip"), "all"),
        Encoder("dinov2", str(folder / "dinov2"), "half", align={"kind": "mlp", "hidden": 2, "ratio": 4}),
    ]
    stage = Stage("measured", 2, case.images, dict.fromkeys(case.trains, 1e-4), micro_batch=case.micro)
    train = Train([stage], precision=case.precision, attention="shared-prefix", checkpointing=case.checkpointing)  # type: ignore[arg-type]
    return Recipe(f"{case.family}-{case.width}", Model(encoders, str(folder / "lm")), Data(group=case.group), train)


def planned(recipe: Recipe) -> dict[str, int]:
    """Bytes part by part, as `commvlm plan --gpu cpu` says."""
    planner = Planner(recipe, machine("cpu", 1), TEXT)
    memory = planner.plan(recipe.train.stages[0]).memory
    return {**dataclasses.asdict(memory), "total": memory.total}


def batch_of(config: Any, images: int, group: int) -> dict[str, Any]:
    """A micro-batch of the plan's own lengths."""
    front = [1] * TEXT.front + [config.image_token_id] * config.num_image_tokens
    ids = (front + [5] * TEXT.words * group) * images
    labels = torch.full((len(ids),), -100)
    row = len(ids) // images
    for image in range(images):
        for number in range(group):
            end = image * row + len(front) + (number + 1) * TEXT.words
            labels[end - TEXT.answer : end] = 7
    places = [*range(len(front)), *list(range(len(front), len(front) + TEXT.words)) * group] * images
    return {
        "input_ids": torch.tensor([ids]), "labels": labels[None], "position_ids": torch.tensor([places]),
        "segments": [[len(front), *[TEXT.words] * group]] * images,
        "pixel_values": torch.randn(images, config.vision_config.pixels_per_image),
    }  # fmt: skip


def run(recipe: Recipe) -> None:
    """Two updates, as a stage makes them."""
    stage, train = recipe.train.stages[0], recipe.train
    model = build_model(**model_settings(recipe.model), weights="random")
    settle_parts(model, stage.trains)
    model.model.language_model.set_attn_implementation(train.attention)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=train.precision == "bf16", report_to="none"
    )
    trainer: Any = StageTrainer(
        model=model, args=arguments, train_dataset=[], method="adamw", trains=stage.trains, decay=0.0, spike=None,
        batch=stage.batch, stopped=Path("stopped.json"),
        adapted=False,
    )  # type: ignore[arg-type]  # fmt: skip
    if train.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = trainer.create_optimizer()
    micro = stage.micro_batch or stage.batch
    for _ in range(2):
        for _ in range(stage.batch // micro):
            batch = batch_of(model.config, micro, recipe.data.group)
            trainer.training_step(model.train(), batch, num_items_in_batch=torch.tensor(stage.batch * TEXT.answer))
            del batch
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(recipe: Recipe, how: str) -> int:
    """Bytes that the updates held at most."""
    if how == "live":
        with live_bytes() as count:
            run(recipe)
        return count.peak
    run(recipe_of(Case("llama", 64, 1, images=1, micro=1, group=1), Path(tempfile.mkdtemp())))  # what is loaded once
    before = resident("VmRSS")
    run(recipe)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), help="one case, in this process; with --how")
    parser.add_argument("--how", choices=("plan", "live", "rss"), default="plan")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(CASES[options.case], Path(folder))
            found = planned(recipe) if options.how == "plan" else {"total": measured(recipe, options.how)}
        print(json.dumps(found))
        return
    rows = {}
    with Console(stderr=True).status("") as status:
        for case in CASES:
            for how in ("plan", "live", "rss"):
                status.update(f"{case}: {how}")
                argv = [sys.executable, __file__, "--case", case, "--how", how]
                # glibc keeps what is freed for itself otherwise, up to a quarter more than is held.
                settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
                said = subprocess.run(argv, check=True, capture_output=True, text=True, env=settings).stdout
                rows[case, how] = json.loads(said.splitlines()[-1])
    if options.json:
        print(json.dumps({f"{case} {how}": row for (case, how), row in rows.items()}, indent=1))
        return
    print(f"{'case':<8}{'planned MB':>11}{'live MB':>9}{'plan/live':>10}{'rss MB':>9}{'plan/rss':>9}  what")
    for name, case in CASES.items():
        plan, live, rss = (rows[name, how]["total"] for how in ("plan", "live", "rss"))
        print(
            f"{name:<8}{plan / 1e6:>11.0f}{live / 1e6:>9.0f}{plan / live:>10.3f}{rss / 1e6:>9.0f}{plan / rss:>9.3f}  {case}"
        )


if __name__ == "__main__":
    main()
