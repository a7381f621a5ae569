"""What a layer sweep costs: this project's way against the naive one, on the same questions.

Ours: the encoder runs once over all images and keeps every layer; questions share their image's prefix. Naive: the encoder
runs in every step of every run, one question a row, rows padded. Both train the same model on the same questions with the
recipe's optimizer. One thread, process time, interleaved, medians; answering after training is left out.

    python benchmarks/study.py --repeats 5
    python benchmarks/study.py --check           # the first updates of a run both ways, loss by loss
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from commvlm.data.collate import Collator
from commvlm.microworld.writer import write_world
from commvlm.model.attention import NAME as SHARED_PREFIX
from commvlm.model.stored_pixels import stored_pixels
from commvlm.study.experiments import rows_of
from commvlm.study.features import prepare_features
from commvlm.study.runs import Places, Run, runs_of
from commvlm.study.settings import Scale, load_scale
from commvlm.train.assemble import assemble
from commvlm.train.optimizers import optimizer_of, words_of
from commvlm.train.parts import settle_parts
from commvlm.train.sources import stage_mixture, training_examples

IMAGES = 64
CHECKED = 20

Stepper = Callable[[int], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (check if options.check else compare)(Path(folder), options.repeats)


def sweep(folder: Path) -> tuple[Scale, list[Run]]:
    scale = replace(load_scale("micro"), seeds=1)
    world = write_world(folder / "world", train=IMAGES, test=4)
    rows = [row for row in rows_of(scale, ["figure-2"]) if row.at["encoder"] == scale.pair[0]]
    return scale, runs_of(scale, rows, data=str(world))


def compare(folder: Path, repeats: int) -> None:
    scale, runs = sweep(folder)
    places, run = Places(folder / "study"), runs[len(runs) // 2]
    began = time.process_time()
    prepare_features(places, runs, kept="fp32")
    per_image = (time.process_time() - began) / IMAGES
    ours, naive = steppers(run, places)
    seconds: dict[str, list[float]] = {"ours": [], "naive": []}
    for number in range(repeats + 1):
        for name, step in (("ours", ours), ("naive", naive)):
            seconds[name].append(step(number)[0])
    step_ours, step_naive = (statistics.median(values[1:]) for values in seconds.values())
    assert scale.world is not None
    steps = sum(stage.steps for stage in run.recipe.train.stages)
    whole_ours = scale.world.train * per_image + len(runs) * steps * step_ours
    whole_naive = len(runs) * steps * step_naive
    print(
        f"one step of {run.recipe.train.stages[0].batch} images x {run.recipe.data.group} questions, seconds: ", end=""
    )
    print(f"ours {step_ours:.3f}, naive {step_naive:.3f}; features of an image: {per_image:.4f}")
    print(f"a sweep of {len(runs)} layers x {steps} steps over {scale.world.train} images, core-seconds: ", end="")
    print(f"ours {whole_ours:,.0f}, naive {whole_naive:,.0f}: {whole_ours / whole_naive:.3f} of it (target 0.333)")


def steppers(run: Run, places: Places) -> tuple[Stepper, Stepper]:
    """Ours and the naive one."""
    return stepper(run, places.view(run.key)), stepper(run, None)


def stepper(run: Run, view: Path | None) -> Stepper:
    """number -> process seconds and loss of that update; view: of the feature stores, None for the naive way."""
    recipe, stage = run.recipe, run.recipe.train.stages[0]
    model, processor = assemble(recipe.model, seed=0)
    settle_parts(model, stage.trains)
    mixture = stage_mixture(stage, recipe.data, training_examples(recipe.data), seed=0)
    pixels = processor.image_processor
    shown = pixels if view is None else stored_pixels(view, model.model.vision_tower, pixels)
    model.model.language_model.set_attn_implementation("sdpa" if view is None else SHARED_PREFIX)
    collator = Collator(
        processor.tokenizer, shown, model.config.num_image_tokens, layout="mask" if view is None else "joined",
        geometry=pixels.geometry,
    )  # fmt: skip
    trained = {name: list(part.parameters()) for name, part in model.parts().items() if name in stage.trains}
    optimizer = optimizer_of(recipe.train.optimizer, trained, stage.trains, decay=stage.decay, words=words_of(model))
    model.train()

    def step(number: int) -> tuple[float, float]:
        groups = [mixture[number * stage.batch + k] for k in range(stage.batch)]
        rows = [[example] for group in groups for example in group] if view is None else groups
        began = time.process_time()
        batch = collator(rows)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began, loss.item()

    return step


def check(folder: Path, repeats: int) -> None:
    """Losses of the same updates both ways. The first difference is one of rounding, which each update makes greater."""
    scale, runs = sweep(folder)
    del scale, repeats
    places, run = Places(folder / "study"), runs[len(runs) // 2]
    prepare_features(places, [run], kept="fp32")
    losses = [[step(number)[1] for number in range(CHECKED)] for step in steppers(run, places)]
    gaps = [abs(a - b) for a, b in zip(*losses, strict=True)]
    print(
        f"{CHECKED} updates of {run.row.name}, ours against naive: losses from {losses[0][0]:.3f} to {losses[0][-1]:.3f}, "
        f"largest difference {max(gaps):.1e}"
    )


if __name__ == "__main__":
    main()
