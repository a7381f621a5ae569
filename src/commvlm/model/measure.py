"""What the visual half of a model takes on this machine: seconds and memory of one image, with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import CommConfig
from .memory import live_bytes
from .vision import CommVisionModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """seconds: median of `runs` forward passes of `batch` images through encoders, branches, fuse and projection. peak_bytes:
    of the tensors held at most beside the weights. device, dtype, threads: where and how."""

    seconds: float
    peak_bytes: int
    runs: int
    batch: int
    device: str
    dtype: str
    threads: int


class VisualHalf(nn.Module):
    """Encoders, branches, fuse, reduction, projection: pixel_values (b, P) -> (b, N, hidden)."""

    def __init__(self, config: CommConfig):
        super().__init__()
        self.vision = CommVisionModel(config.vision_config)  # type: ignore[arg-type]
        self.project = config.make_project()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.project(self.vision(pixel_values).last_hidden_state)


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Bytes held at most during `run` beyond what was held before it: the allocator's own count on a GPU, the live tensors'
    elsewhere."""
    if device != "cuda":
        with live_bytes() as count:
            run()
        return count.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    config: CommConfig, *, runs: int = 3, batch: int = 1, dtype: str = "bf16", device: str | None = None
) -> Measured:
    """Measures the visual half of `config` after one warm-up pass; the language model is not built."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = DTYPES[dtype]
    half = VisualHalf(config).to(device=device, dtype=kind).eval()
    width = config.vision_config.pixels_per_image  # type: ignore[union-attr]
    pixels = torch.randn(batch, width, generator=torch.Generator().manual_seed(0)).to(device, kind)
    seconds = []
    with torch.inference_mode():
        peak = peak_bytes(lambda: half(pixels), device)
        for _ in range(runs):
            begin = time.perf_counter()
            half(pixels)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return Measured(statistics.median(seconds), peak, runs, batch, device, dtype, torch.get_num_threads())
