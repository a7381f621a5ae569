"""COMM's visual branch against the two bare encoders, and against the way that keeps all hidden states and merges them then.

    python benchmarks/visual_branch.py                      # ViT-L/14 x 2 at 336 pixels, bf16, random weights
    python benchmarks/visual_branch.py --repeats 9 --threads 2
    python benchmarks/visual_branch.py --device cuda --batch 16 --compile

One process, the contenders in turn, medians; on a CPU, seconds are the process's own. Everything is a ratio to the bare
encoders of the same run. Memory is counted in feature maps: the patch tokens of one layer of one encoder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from commvlm.model.encoders import stream_layers
from commvlm.model.families import family_of
from commvlm.model.measure import DTYPES, VisualHalf, peak_bytes
from commvlm.model.spec import build_config
from commvlm.train.assemble import model_settings
from commvlm.train.recipe import load_recipe

BARE = "two bare encoders"
MERGED = "encoders + merges, streamed"
WHOLE = "whole branch: + MLP, concat, projection"
KEPT = "all hidden states kept, then the same merges"


def contenders(half: Any, pixels: Tensor) -> dict[str, Callable[[], Any]]:
    """Name -> one forward pass."""
    vision = half.vision
    pieces = dict(zip(vision.config.names, vision.split_pixels(pixels), strict=True))
    settings = {branch["name"]: branch for branch in vision.config.branches}

    def encoder(name: str, **options: Any) -> Any:
        family = family_of(vision.encoder(name).config)
        return vision.encoder(name)(pixel_values=pieces[name], **family.call, **options)

    def bare() -> list[Any]:
        return [encoder(name).last_hidden_state for name in pieces]

    def merged() -> list[Tensor]:
        folds = []
        for name, setting in settings.items():
            fold = vision.branches[name].fold()
            stream_layers(vision.encoder(name), pieces[name], layers=setting["layers"], take=fold.take)
            folds.append(fold.result())
        return folds

    def kept() -> list[Tensor]:
        merges = []
        for name, setting in settings.items():
            hidden = encoder(name, output_hidden_states=True).hidden_states
            merge = vision.branches[name].merge
            weights, total = merge.weights, 0
            for index, layer in enumerate(setting["layers"]):
                total = total + weights[index] * merge.lln(index, hidden[layer][:, 1:])
            merges.append(total)
        return merges

    return {BARE: bare, MERGED: merged, WHOLE: lambda: half(pixels), KEPT: kept}


def flops(run: Callable[[], Any]) -> int:
    """Counted where sums are not in place, which the counter does not see."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    begin = time.process_time()
    run()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="comm-7b", help="whose visual half (comm-7b)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: the steadiest)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="also the encoders' blocks through torch.compile")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = build_config(**model_settings(load_recipe(options.recipe).model))
    torch.manual_seed(0)
    half = VisualHalf(config).to(options.device, DTYPES[options.dtype]).eval()
    if options.compile:
        for name in half.vision.config.names:
            encoder = half.vision.encoder(name)
            for block in family_of(encoder.config).blocks(encoder):
                block.compile()
    pixels = torch.randn(options.batch, half.vision.config.pixels_per_image).to(options.device, DTYPES[options.dtype])
    runs = contenders(half, pixels)
    grid = half.vision.config.grid_of(half.vision.config.names[0])
    width = half.vision.config.encoder_config(half.vision.config.names[0]).hidden_size
    one = options.batch * grid[0] * grid[1] * width * pixels.element_size()

    with torch.no_grad():
        streamed, held = runs[MERGED](), runs[KEPT]()
        error = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(streamed, held, strict=True))
        del streamed, held
        work = {name: flops(run) for name, run in runs.items()}
        peaks = {name: peak_bytes(run, options.device) for name, run in runs.items()}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("timing", total=options.repeats * len(runs))
            for repeat in range(options.repeats):
                order = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
                for name in order:
                    taken[name].append(seconds(runs[name], options.device))
                    bar.advance(task)

    rows = []
    for name in runs:
        ratios = [a / b for a, b in zip(taken[name], taken[BARE], strict=True)]
        rows.append(
            {
                "way": name,
                "seconds": statistics.median(taken[name]),
                "time": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "flops": work[name] / work[BARE],
                "maps": (peaks[name] - peaks[BARE]) / one,
            }
        )
    facts = {"largest difference of streamed and kept, relative": error, **vars(options), "torch": torch.__version__}
    if options.json:
        print(json.dumps({"rows": rows, "facts": facts}, indent=1))
        return
    print(f"{'way':<50}{'seconds':>9}{'time x':>9}{'min-max':>15}{'FLOPs x':>9}{'maps beyond bare':>18}")
    for row in rows:
        spread = f"{row['spread'][0]:.3f}-{row['spread'][1]:.3f}"
        print(
            f"{row['way']:<50}{row['seconds']:>9.2f}{row['time']:>9.3f}{spread:>15}{row['flops']:>9.3f}{row['maps']:>18.2f}"
        )
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))


if __name__ == "__main__":
    main()
