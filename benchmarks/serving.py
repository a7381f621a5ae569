"""Requests per second: `commvlm serve` against `transformers serve`, which answers one request at a time.

    python benchmarks/serving.py                     the micro world's tiny model, 1, 8 and 32 clients
    python benchmarks/serving.py --clients 32 --rounds 5

Both servers run on loopback in processes of their own, have the same saved model, and take turns, so that what else the
machine does slows both. Each client sends its next request when it has its answer; every request shows an image that no
request showed before, and asks for an answer of 24 tokens, which no end token cuts short. The answers are compared, and the
share of equal ones is printed.

`transformers serve` refuses models that are not the library's own: the peer's process is its unchanged command after two
lines that enter this model in the library's tables (see `_peer`). Continuous batching it has for text models only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from openai import AsyncOpenAI
from PIL import Image

TOKENS = 24
QUESTIONS = ("Where is the red star? Answer with its box.", "What is left of the blue house?", "Describe the image.")


@dataclass
class Side:
    """A server of the benchmark, and for each round its requests per second and per second of its own processor time."""

    url: str
    model: str
    process: psutil.Process
    rates: list[float] = field(default_factory=list)
    cpu_rates: list[float] = field(default_factory=list)

    def round(self, bodies: Sequence[Any], *, clients: int) -> list[str]:
        """The answers, in order."""
        start, used = time.perf_counter(), self._used()
        answers = asyncio.run(_ask(self, bodies, clients))
        self.rates.append(len(bodies) / (time.perf_counter() - start))
        self.cpu_rates.append(len(bodies) / (self._used() - used))
        return answers

    def _used(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64, help="of one round, at least one for each client")
    parser.add_argument("--peer-process", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer_process is not None:
        _peer(options.peer_process)
        return
    with tempfile.TemporaryDirectory() as folder:
        scenes = _saved(Path(folder))
        with _server(_ours(folder)) as ours, _server(_theirs(folder)) as theirs:
            sides = Side(ours[0], "model", ours[1]), Side(theirs[0], f"{folder}/model", theirs[1])
            print(f"answers of {TOKENS} tokens, {os.cpu_count()} cores, medians of {options.rounds} rounds\n")
            print("clients   transformers serve   commvlm serve   ratio   by processor time   same answers")
            numbers = itertools.count()
            for side in sides:
                side.round(_bodies(scenes, numbers, 2), clients=1)  # both warm
            for clients in options.clients:
                size = max(options.requests, clients) if clients > 1 else max(1, options.requests // 4)
                _compare(sides, scenes, numbers, clients=clients, size=size, rounds=options.rounds)


def _compare(
    sides: tuple[Side, Side], scenes: Sequence[Path], numbers: Iterator[int], *, clients: int, size: int, rounds: int
) -> None:
    """Prints one line. sides: ours, theirs."""
    same = 0.0
    for side in sides:
        side.rates, side.cpu_rates = [], []
    for turn in range(rounds):
        bodies = _bodies(scenes, numbers, size)
        said = [side.round(bodies, clients=clients) for side in (sides if turn % 2 else sides[::-1])]
        same += sum(a.strip() == b.strip() for a, b in zip(*said, strict=True)) / size
    ours, theirs = (statistics.median(side.rates) for side in sides)
    mine, other = (statistics.median(side.cpu_rates) for side in sides)
    print(
        f"{clients:7} {theirs:18.2f} /s {ours:13.2f} /s {ours / theirs:6.1f}x {mine / other:18.1f}x "
        f"{same / rounds:13.1%}", flush=True,
    )  # fmt: skip


def _saved(folder: Path) -> list[Path]:
    """A model in folder/model whose answers never end by themselves, and scenes."""
    from commvlm.microworld.writer import write_world
    from commvlm.train.assemble import assemble
    from commvlm.train.recipe import load_recipe
    from commvlm.train.whole import save_whole

    model, processor = assemble(load_recipe("micro").model)
    model.generation_config.eos_token_id = None
    save_whole(folder / "model", model, processor)
    return sorted((write_world(folder / "world", train=1, test=40) / "images").glob("micro_test_*"))


def _bodies(scenes: Sequence[Path], numbers: Iterator[int], size: int) -> list[list[dict[str, Any]]]:
    """Messages of `size` requests, each with an image of its own: a scene with one pixel changed."""
    bodies = []
    for number in itertools.islice(numbers, size):
        with Image.open(scenes[number % len(scenes)]) as opened:
            image = opened.convert("RGB")
        image.putpixel((number % image.width, number // image.width % image.height), (number % 251, 7, 99))
        image.putpixel((0, 0), (number // 251 % 251, number % 251, 1))
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[number % 3]}]
        bodies.append([{"role": "user", "content": content}])
    return bodies


async def _ask(side: Side, bodies: Sequence[Any], clients: int) -> list[str]:
    answers = [""] * len(bodies)
    places = iter(range(len(bodies)))

    async def client() -> None:
        for place in places:
            said = await api.chat.completions.create(model=side.model, messages=bodies[place], max_tokens=TOKENS)
            answers[place] = said.choices[0].message.content or ""

    async with AsyncOpenAI(base_url=side.url, api_key="none", max_retries=0, timeout=600) as api:
        await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def _ours(folder: str) -> list[str]:
    return [sys.executable, "-m", "commvlm.cli", "serve", f"{folder}/model", "--port", "0"]


def _theirs(folder: str) -> list[str]:
    command = ["serve", f"{folder}/model", "--host", "127.0.0.1", "--port", "0", "--log-level", "info"]
    return [sys.executable, __file__, "--peer-process", *command]


def _peer(argv: list[str]) -> None:
    from transformers.models.auto import modeling_auto

    from commvlm.model import CommForConditionalGeneration

    sys.modules["transformers"].CommForConditionalGeneration = CommForConditionalGeneration
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["comm"] = "CommForConditionalGeneration"
    from transformers.cli.transformers import main as transformers

    sys.argv = ["transformers", *argv]
    transformers()


@contextmanager
def _server(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Its base URL, as soon as it says where it listens, and its process."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            end = time.monotonic() + 180
            while not (found := re.search(r"on (http://127\.0\.0\.1:[1-9]\d*)", Path(log.name).read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{command[1:4]} did not start:\n{Path(log.name).read_text()[-2000:]}")
                time.sleep(0.2)
            yield f"{found[1]}/v1", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    main()
