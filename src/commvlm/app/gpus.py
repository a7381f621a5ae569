"""Accelerators by name: memory, its bandwidth, and dense bf16 speed as their makers publish them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory: bytes, as published (10^9 a GB, a little less than the driver shows). peak: dense bf16 FLOPs a second, without
    sparsity. bandwidth: bytes a second between the two."""

    name: str
    memory: float
    peak: float
    bandwidth: float


def _gpu(name: str, gigabytes: float, teraflops: float, gigabytes_a_second: float) -> Gpu:
    return Gpu(name, gigabytes * 1e9, teraflops * 1e12, gigabytes_a_second * 1e9)


# NVIDIA's data sheets: A100 (also of the A800, whose links alone are slower), H100 SXM (also of the H800), H200 SXM, HGX
# B200, L4, L40S; of the GeForce and RTX cards the tensor cores' bf16 with fp32 accumulation, from the GA102 and Ada
# white papers. Where a sheet gives the number with sparsity, half of it.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 40, 312, 1555), _gpu("a100-80", 80, 312, 2039), _gpu("a800-80", 80, 312, 2039),
        _gpu("h100", 80, 989.4, 3350), _gpu("h800", 80, 989.4, 3350), _gpu("h200", 141, 989.4, 4800),
        _gpu("b200", 180, 2250, 8000), _gpu("l4", 24, 121, 300), _gpu("l40s", 48, 362, 864),
        _gpu("a6000", 48, 154.8, 768), _gpu("3090", 24, 71.2, 936), _gpu("4090", 24, 165.2, 1008),
    )
}  # fmt: skip
