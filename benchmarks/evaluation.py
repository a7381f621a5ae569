"""Answers per second: shared prefixes, images read once and batches, against one question at a time.

    python benchmarks/evaluation.py                      the micro world's tiny model
    python benchmarks/evaluation.py --branch vit-l       behind CLIP ViT-L/14-336 and DINOv2-L, true shapes, random weights
    python benchmarks/evaluation.py --device cuda --precision bf16

The peer is how LLaVA's, Shikra's and InternVL's scripts and lmms-eval's LLaVA classes ask: batch 1, the image opened,
encoded and prefilled for every question, the library's `generate`. Both sides have the same model, the same questions, give
the same answers (checked, the share is printed) and take turns; no answer ends early: both write the same number of tokens.

    POPE-like   6 questions an image, answers of 2 tokens
    REC-like    4 questions an image, answers of 22 tokens
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from commvlm.app.answering import Answerer
from commvlm.data.example import Example, Turn
from commvlm.evaluate.tasks import task_named
from commvlm.microworld.writer import write_world
from commvlm.model.build import EncoderSpec, build_model, build_processor
from commvlm.train.assemble import assemble, load_tokenizer, located
from commvlm.train.recipe import load_recipe
from commvlm.train.whole import save_whole

SETS = {"POPE-like": ("pope", 6, 2), "REC-like": ("rec", 4, 22)}
WORDS = ("red star", "blue ring", "small green box by the wall", "large cup", "yellow door on the left", "grey lamp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branch", default="micro", choices=("micro", "vit-l"))
    parser.add_argument("--images", type=int, help="40 for micro, 2 for vit-l")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, help="3 for micro, 1 for vit-l")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    number = options.images or {"micro": 40, "vit-l": 2}[options.branch]
    rounds = options.rounds or {"micro": 3, "vit-l": 1}[options.branch]
    with tempfile.TemporaryDirectory() as folder:
        images = sorted((write_world(Path(folder) / "world", train=1, test=number) / "images").glob("micro_test_*"))
        save_whole(Path(folder) / "model", *_model(options.branch))
        answer = Answerer(
            Path(folder) / "model", batch_size=options.batch, precision=options.precision, device=options.device
        )
        # No id ends an answer: both sides write exactly as many tokens as they may.
        answer.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
        print(
            f"{options.branch}, {number} images, {options.device}, {options.precision}, {torch.get_num_threads()} threads"
        )
        for name, (task, questions, tokens) in SETS.items():
            _compare(name, answer, _asked(images, task, questions), tokens=tokens, rounds=rounds)


def _model(branch: str) -> tuple[Any, Any]:
    if branch == "micro":
        return assemble(load_recipe("micro").model)
    tokenizer, language_model = load_tokenizer("micro:lm"), located("micro:lm")
    half: dict[str, Any] = {"merge": "lln-layerscale", "weights": "random", "image_size": 336}
    mlp = {"kind": "mlp", "hidden": 2, "ratio": 4}
    model = build_model(
        [
            EncoderSpec("clip", "openai/clip-vit-large-patch14-336", layers="all", **half),
            EncoderSpec("dinov2", "facebook/dinov2-large", layers="19-24", align=mlp, **half),
        ],
        language_model=language_model, fuse="channel-concat", project="linear", tokenizer=tokenizer, seed=0,
    )  # fmt: skip
    return model, build_processor(model.config, tokenizer)


def _asked(images: Sequence[Path], task: str, questions: int) -> list[Example]:
    return [
        task_named(task).instruct(Example(f"{image.stem}:{k}", task, image, (Turn(WORDS[k], ""),)))
        for image in images
        for k in range(questions)
    ]


def _compare(name: str, answer: Answerer, examples: list[Example], *, tokens: int, rounds: int) -> None:
    answer.decoder.max_new_tokens = tokens
    ours, theirs = [], []
    said: list[list[str]] = [[], []]
    for _ in range(rounds):
        answer.forget()
        seconds, said[0] = _timed(lambda: answer(examples), answer)
        ours.append(seconds)
        seconds, said[1] = _timed(lambda: [_one_by_one(answer, e, tokens) for e in examples], answer)
        theirs.append(seconds)
    same = sum(a == b for a, b in zip(*said, strict=True)) / len(examples)
    fast, slow = (len(examples) / statistics.median(each) for each in (ours, theirs))
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"{name}: {len(examples)} questions, {tokens} tokens each: {fast:.2f} answers/s, one at a time {slow:.2f} answers/s, "
        f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}); "
        f"{100 * same:.1f} % of the answers equal ({len(set(said[0]))} different ones)",
        flush=True,
    )


def _timed(run: Callable[[], list[str]], answer: Answerer) -> tuple[float, list[str]]:
    """Process time on a CPU, which others' work leaves alone; time on the clock on a device."""
    clock = time.process_time if answer.device.type == "cpu" else time.perf_counter
    start = clock()
    said = run()
    if answer.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, said


@torch.inference_mode()
def _one_by_one(answer: Answerer, example: Example, tokens: int) -> str:
    """The peers' way, on the same model: everything anew for every question."""
    batch = {name: tensor.to(answer.device) for name, tensor in answer.collator.prompt_batch([example]).items()}
    with torch.autocast(answer.device.type, torch.bfloat16, enabled=answer.precision == "bf16"):
        generate: Any = answer.model.generate
        ids = generate(**batch, max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=answer.decoder.pad)
    said = ids[:, batch["input_ids"].shape[1] :]
    return answer.processor.tokenizer.batch_decode(said, skip_special_tokens=True)[0].strip()


if __name__ == "__main__":
    main()
