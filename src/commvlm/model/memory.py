"""How much memory a computation holds at most: counted from its tensors, the same on every run and device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still held: `now`, and at most so far, `peak`.

    What an operation uses within itself and gives back before it ends is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What was there before counts as nothing, even when an operation gives it back.
        for tensor in tensors((args, kwargs)):
            self._see(tensor, count=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self._see(tensor, count=True)
        return result

    def _see(self, tensor: torch.Tensor, *, count: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if count else 0
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts. The library's own walk leaves a cycle behind, which keeps them alive until
    the collector runs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """The count of what happens inside; read `peak` and `now` from it."""
    with LiveBytes() as count:
        yield count
