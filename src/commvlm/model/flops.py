"""FLOPs of a computation, counted operation by operation; a multiplication and an addition are two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def _sdpa_on_cpu(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_on_cpu_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


ON_CPU = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_on_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_on_cpu_backward,
}
"""SDPA as CPUs run it, which the library's counter leaves out. Like its own formulas: causal or not, all scores."""


def flop_counter() -> FlopCounterMode:
    """A counter that knows SDPA on CPUs, too."""
    return FlopCounterMode(display=False, custom_mapping=ON_CPU)


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of what `run` does, gradients included where it asks for them."""
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()
