"""A training step of ours against the library's: `LlavaForConditionalGeneration` in `Trainer`, the usual way.

    python benchmarks/training.py                           # 5 questions an image, then 1; minutes on one core
    python benchmarks/training.py --questions 10 --repeats 5
    python benchmarks/training.py --device cuda --dtype bf16 --width 4096 --layers 32 --heads 32 --inner 11008 --images 2
    python benchmarks/training.py --device cuda --mfu comm-7b --gpu h200       # model FLOPs utilisation of a step

The usual way: one question a row with its image, rows padded to the longest and masked, logits of every position, the encoder
run for every row. Ours: each image once, its questions behind it, all in one row without padding (attention "packed"), logits
where supervised. Both have the same weights (ours are imported from theirs), images, ids, labels, the library's Trainer and
AdamW; their first losses must be equal. One process, the two in turn, medians of ratios; on a CPU, the process's own seconds.

Memory is what a step holds at most beside weights, gradients and optimizer: live tensors, on a GPU the allocator's count. The
ceiling is the ratio of counted FLOPs: what the time would be if every operation ran at one speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from commvlm.data.dialogue import IGNORED, Encoded
from commvlm.data.example import Example
from commvlm.data.packing import joined_row, pack, padded_rows
from commvlm.model.attention import available
from commvlm.model.flops import count_flops
from commvlm.model.importing import import_llava
from commvlm.model.measure import peak_bytes
from commvlm.train.parts import settle_parts

IMAGE_ID = 32000
TRAINS = dict.fromkeys(("project", "language_model"), 2e-5)


@dataclass(frozen=True)
class Dialogues:
    """pixels (images, 3, S, S); rows [image][question]: ids and labels of a whole dialogue."""

    pixels: torch.Tensor
    rows: list[list[Encoded]]


def dialogues(options: argparse.Namespace, questions: int, images: int) -> Dialogues:
    """Random pixels and words: 5 words and the image, then text of `--text` words on average, a third of it supervised."""
    rng = np.random.default_rng(0)
    front = np.concatenate([[1], rng.integers(3, 32000, 4), np.full(options.tokens, IMAGE_ID)])
    made = []
    for _ in range(images):
        rows = []
        for _ in range(questions):
            length = int(rng.integers(round(0.6 * options.text), round(1.4 * options.text) + 1))
            text, answer = rng.integers(3, 32000, length), max(1, length // 3)
            labels = np.concatenate([np.full(len(front) + length - answer, IGNORED), text[-answer:]])
            rows.append(Encoded(np.concatenate([front, text]), labels))
        made.append(rows)
    side = round(options.tokens**0.5) * 14
    return Dialogues(torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0)), made)


def usual_batch(data: Dialogues) -> dict[str, Any]:
    batch = padded_rows([row for rows in data.rows for row in rows], pad=0)
    del batch["position_ids"]
    return batch | {"pixel_values": data.pixels.repeat_interleave(len(data.rows[0]), 0)}


def our_batch(data: Dialogues) -> dict[str, Any]:
    example = Example("random", "dialogue", None, ())
    packed = [pack([(example, row) for row in rows], image_id=IMAGE_ID) for rows in data.rows]
    return joined_row(packed) | {"pixel_values": data.pixels.flatten(1)}


def models(options: argparse.Namespace) -> tuple[Any, Any]:
    """Theirs with random weights, and ours with the same."""
    side = round(options.tokens**0.5) * 14
    vision = CLIPVisionConfig(
        hidden_size=options.width // 2, intermediate_size=options.width * 2, num_hidden_layers=options.layers,
        num_attention_heads=options.heads // 2, image_size=side, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=options.width, intermediate_size=options.inner or round(options.width * 2.75),
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        tie_word_embeddings=False,
        image_seq_length=options.tokens,
    )
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(config)
    theirs.model.vision_tower.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = import_llava(folder)
    settle_parts(ours, TRAINS)
    ours.model.language_model.set_attn_implementation(available("packed"))
    return theirs, ours


def steps(options: argparse.Namespace, theirs: Any, ours: Any, data: Dialogues) -> dict[str, Callable[[], float]]:
    """Way -> one whole training step, which gives its loss."""
    made = {}
    for name, model, batch in (("usual", theirs, usual_batch(data)), ("ours", ours, our_batch(data))):
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            use_cpu=options.device == "cpu",
            bf16=options.dtype == "bf16",
            report_to="none",
        )
        trainer: Any = Trainer(model=model, args=arguments, train_dataset=[])
        optimizer = trainer.create_optimizer()
        number = (batch["labels"] != IGNORED).sum()

        def step(
            model: Any = model, trainer: Any = trainer, optimizer: Any = optimizer, batch: Any = batch, n: Any = number
        ) -> float:
            loss = trainer.training_step(model, dict(batch), num_items_in_batch=n)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            return float(loss)

        made[name] = step
    return made


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


def compare(options: argparse.Namespace, questions: int, images: int) -> list[dict[str, Any]]:
    """The two ways on the same images with so many questions each."""
    theirs, ours = models(options)
    runs = steps(options, theirs, ours, dialogues(options, questions, images))
    losses = {name: run() for name, run in runs.items()}  # the first step also makes gradients and optimizer state
    work = {name: count_flops(run) for name, run in runs.items()}
    peaks = {name: peak_bytes(run, options.device) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{questions} questions an image", total=options.repeats * 2)
        for repeat in range(options.repeats):
            for name in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
                taken[name].append(seconds(runs[name], options.device))
                bar.advance(task)
    ratios = [a / b for a, b in zip(taken["usual"], taken["ours"], strict=True)]
    answers = questions * images
    return [
        {
            "questions": questions, "images": images, "way": name,
            "answers a second": answers / statistics.median(taken[name]),
            "times": statistics.median(ratios) if name == "ours" else 1.0,
            "spread": [min(ratios), max(ratios)] if name == "ours" else [1.0, 1.0],
            "ceiling": work["usual"] / work[name], "peak MB": peaks[name] / 1e6, "memory x": peaks[name] / peaks["usual"],
            "first loss": losses[name],
        }
        for name in runs
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5, help="an image (5)")
    parser.add_argument(
        "--images", type=int, default=1, help="of a step with several questions; without, as many rows (1)"
    )
    parser.add_argument("--tokens", type=int, default=576, help="visual tokens, a square number (576)")
    parser.add_argument("--text", type=int, default=40, help="words of a question and answer on average (40)")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--inner", type=int, help="width inside the MLP (2.75 x width)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1: the steadiest)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="bf16: autocast (fp32)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=("several", "one"), help="one half of the comparison")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    if options.only != "one":
        rows += compare(options, options.questions, options.images)
    if options.only != "several":
        rows += compare(options, 1, options.questions * options.images)
    if options.json:
        print(json.dumps({"rows": rows, "facts": {**vars(options), "torch": torch.__version__}}, indent=1))
        return
    head = f"{'questions':>9}{'images':>7}  {'way':<7}{'answers/s':>10}{'times':>7}{'min-max':>13}{'ceiling':>9}"
    print(f"{head}{'peak MB':>9}{'x':>6}  loss")
    for row in rows:
        spread = f"{row['spread'][0]:.2f}-{row['spread'][1]:.2f}"
        print(
            f"{row['questions']:>9}{row['images']:>7}  {row['way']:<7}{row['answers a second']:>10.3f}{row['times']:>7.2f}"
            f"{spread:>13}{row['ceiling']:>9.2f}{row['peak MB']:>9.0f}{row['memory x']:>6.2f}  {row['first loss']:.5f}"
        )


if __name__ == "__main__":
    main()
