"""Data: examples a second against HF's LLaVA processor, and what a million examples cost to open and to read.

    python benchmarks/data.py                    both
    python benchmarks/data.py throughput         COCO photos and questions -> two encoders' pixels and tokens, two processes
    python benchmarks/data.py million            a store of 1,000,000 examples: seconds and MB

throughput. Both sides get the same JPEGs (640 x 480) and the same dialogues, decode, resize to 336, normalise and tokenise in
two worker processes of torch's DataLoader. Ours opens an image once for both encoders. The peer is transformers'
LlavaProcessor with CLIP's image processor; "two encoders" adds the second encoder's own image processor on the opened
picture, as its users do; "one encoder" is the peer with half of the work. Rounds are interleaved, a figure is the median
of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

ROUNDS, IMAGES, BATCH, WORKERS, SIZE = 5, 256, 16, 2, 336
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
DINO = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MILLION = 1_000_000


def write_photos(folder: Path) -> list[Path]:
    """JPEGs that cost what COCO's cost: 640 x 480, quality 90, detail at every scale."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(IMAGES):
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((640, 480)), dtype=float)
            for h, w in ((6, 8), (30, 40), (120, 160), (480, 640))
        ]
        mixed = sum(weight * layer for weight, layer in zip((0.5, 0.25, 0.15, 0.1), layers, strict=True))
        picture = Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
        paths.append(folder / f"{number:012d}.jpg")
        picture.save(paths[-1], quality=90)
    return paths


def examples_of(paths: list[Path]) -> list[Any]:
    from commvlm.data.example import BOXES, Example, Turn

    texts = ("the red cup on the left", "a person who is looking at the camera", "the second chair from the right")
    return [
        Example(str(n), "rec", path, (Turn(texts[n % 3], BOXES, answer_boxes=(((10, 20, 300 + n, 200),),)),))
        for n, path in enumerate(paths)
    ]


class Ours:
    """Mixture's examples -> our collator."""

    def __init__(self, tokenizer: Any) -> None:
        from commvlm.data.collate import Collator
        from commvlm.model.processing import CommImageProcessor

        encoders = [{"name": "clip", "size": SIZE, **CLIP}, {"name": "dinov2", "size": SIZE, **DINO}]
        self.collate = Collator(tokenizer, CommImageProcessor(encoders=encoders), 576)

    def __call__(self, examples: list[Any]) -> Any:
        return self.collate([[example] for example in examples])


class Peer:
    """The same examples through LlavaProcessor, and through the second encoder's image processor where there are two."""

    def __init__(self, tokenizer: Any, encoders: int) -> None:
        from transformers import BitImageProcessor, CLIPImageProcessor, LlavaProcessor

        square = {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False}
        clip: Any = CLIPImageProcessor(**square, image_mean=CLIP["mean"], image_std=CLIP["std"])
        self.processor = LlavaProcessor(clip, tokenizer, patch_size=14, vision_feature_select_strategy="default")
        dino: Any = BitImageProcessor(**square, image_mean=DINO["mean"], image_std=DINO["std"])
        self.second = dino if encoders == 2 else None

    def __call__(self, examples: list[Any]) -> Any:
        from commvlm.data.boxes import PadSquare
        from commvlm.data.dialogue import render
        from commvlm.data.images import open_image
        from commvlm.model.processing import pad_square

        pictures = [pad_square(open_image(example.image), background=(255, 255, 255)) for example in examples]
        texts = [render(example, geometry=PadSquare(640, 480)).text for example in examples]
        batch = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        if self.second is not None:
            batch["second"] = self.second(images=pictures, return_tensors="pt")["pixel_values"]
        return batch


def seconds(examples: list[Any], collate: Any) -> float:
    from torch.utils.data import DataLoader

    loader = DataLoader(examples, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)  # type: ignore[arg-type]
    batches = iter(loader)
    next(batches)  # workers are up
    began = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - began) / (count * BATCH)


def throughput() -> None:
    import torch

    from commvlm.data.templates import instruct
    from commvlm.train.assemble import load_tokenizer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        examples = [instruct(example) for example in examples_of(write_photos(Path(folder)))]
        tokenizer = load_tokenizer("micro:lm")
        sides = {"ours": Ours(tokenizer), "two encoders": Peer(tokenizer, 2), "one encoder": Peer(tokenizer, 1)}
        ours, two = (sides[name](examples[:2]) for name in ("ours", "two encoders"))
        assert ours["pixel_values"].shape == (2, 2 * 3 * SIZE * SIZE)
        difference = (ours["pixel_values"][:, : 3 * SIZE * SIZE] - two["pixel_values"].flatten(1)).abs().max()
        assert difference < 0.05, f"the peer's pixels are others: {difference}"
        taken = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, side in sides.items():
                taken[name].append(seconds(examples, side))
    rate = {name: 1 / median(values) for name, values in taken.items()}
    print(f"examples/s in {WORKERS} workers: " + ", ".join(f"{name} {value:.0f}" for name, value in rate.items()))
    for name in ("two encoders", "one encoder"):
        ratio = median(peer / own for peer, own in zip(taken[name], taken["ours"], strict=True))
        print(f"ours, two encoders, against LlavaProcessor, {name}: ratio {ratio:.2f}")


CHILD = """
import json, sys, time
from pathlib import Path
from commvlm.train.recipe import load_recipe
from commvlm.train.sources import stage_mixture, training_examples
def rss(): return int([l for l in open('/proc/self/status') if l.startswith('VmRSS')][0].split()[1]) / 1024
root, group, draws = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
options = ['--data.root', str(root), '--data.group', group, '--data.sources', (root / 'sources.json').read_text(),
           '--train.stages', (root / 'stages.json').read_text()]
recipe = load_recipe('micro', options)
before, began = rss(), time.perf_counter()
mixture = stage_mixture(recipe.train.stages[0], recipe.data, training_examples(recipe.data), seed=0)
opened, size = time.perf_counter() - began, rss()
first, sizes, began = mixture[0], [], time.perf_counter()
for index in range(draws):
    mixture[index]
    if index % (draws // 10) == draws // 10 - 1: sizes.append(round(rss()))
draw = (time.perf_counter() - began) / draws
print(json.dumps({'opened': opened, 'before': before, 'size': size, 'sizes': sizes, 'draw': draw}))
"""


def million(draws: int) -> None:
    from commvlm.microworld.writer import write_world

    with tempfile.TemporaryDirectory() as folder:
        root = write_world(Path(folder) / "world", train=2000, test=1)
        rows = (root / "train" / "rec.jsonl").read_text().splitlines()
        with (root / "train" / "million.jsonl").open("w") as file:
            for number in range(MILLION):
                file.write(f"{rows[number % len(rows)]}\n")
        source = {
            "name": "rec",
            "format": "refer-jsonl",
            "images": "images",
            "files": {"annotations": "train/million.jsonl"},
        }
        stage = {"name": "one", "steps": MILLION, "batch": 1, "trains": {"project": 1.0e-3}}
        (root / "sources.json").write_text(json.dumps([{**source, "options": {"task": "rec"}}]))
        (root / "stages.json").write_text(json.dumps([stage]))
        command = [sys.executable, "-m", "commvlm.cli", "data", "prepare", "micro", "--data.root", str(root)]
        command += ["--evaluate.sources", "[]", "--data.sources", (root / "sources.json").read_text()]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        prepared = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        size = sum(path.stat().st_size for path in (root / ".prepared").rglob("*") if path.is_file()) / 1e6
        print(f"prepare: {MILLION:,} lines in {prepared:.0f} s, {peak:.0f} MB at most, a store of {size:.0f} MB")
        for group in ("1", "10"):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(root), group, str(draws)], check=True, capture_output=True, text=True
            )
            said = json.loads(done.stdout)
            print(
                f"group {group}: opened in {said['opened']:.2f} s, {said['size']:.0f} MB resident "
                f"({said['before']:.0f} MB of them imports), {said['draw'] * 1e3:.2f} ms a draw; "
                f"over {draws:,} draws {said['sizes']} MB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=("throughput", "million"), help="one of the two; both by default")
    parser.add_argument("--draws", type=int, default=MILLION // 10, help="draws over which memory is watched")
    options = parser.parse_args()
    if options.which != "million":
        throughput()
    if options.which != "throughput":
        million(options.draws)


if __name__ == "__main__":
    main()
