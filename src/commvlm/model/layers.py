"""Layer numbers, in one place: 1-based block outputs wherever a person sees them.

Layer k of an encoder is what its k-th block gives out, before the encoder's final norm. -1 is the last block. 0 (the
embeddings, in the library's count) is not a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LayerSpec = int | str | list[int | str] | tuple[int | str, ...]
"""12, -2, "12", "19-24", "all", "half" (the second half), or a list of those."""


def parse_layers(spec: LayerSpec, depth: int) -> tuple[int, ...]:
    """The layers that `spec` asks of an encoder of `depth` blocks: ascending, 1-based, each once.

    Raises ValueError, naming the depth and what is valid, for 0, a number beyond the depth, a layer asked twice, an
    empty list and anything malformed.
    """
    entries = list(spec) if isinstance(spec, list | tuple) else [spec]
    layers = [layer for entry in entries for layer in _expand(entry, depth)]
    if not layers:
        raise _refusal(spec, depth, "no layer is asked for")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise _refusal(spec, depth, f"layer {twice[0]} is asked for twice")
    return tuple(sorted(layers))


def _expand(entry: int | str, depth: int) -> Iterable[int]:
    if isinstance(entry, bool) or not isinstance(entry, int | str):
        raise _refusal(entry, depth, f"a {type(entry).__name__} is no layer")
    if isinstance(entry, int):
        return [_layer(entry, entry, depth)]
    text = entry.strip()
    if text == "all":
        return range(1, depth + 1)
    if text == "half":
        return range(depth // 2 + 1, depth + 1)
    if re.fullmatch(r"-?\d+", text):
        return [_layer(int(text), entry, depth)]
    ends = re.fullmatch(r"(\d+)\s*-\s*(\d+)", text)
    if ends is None:
        raise _refusal(entry, depth, "it cannot be read")
    first, last = (_layer(int(end), entry, depth) for end in ends.groups())
    if first > last:
        raise _refusal(entry, depth, f"it ends ({last}) before it starts ({first})")
    return range(first, last + 1)


def _layer(number: int, spec: int | str, depth: int) -> int:
    """One number as a layer: negative ones count from the last block."""
    if number == 0:
        raise _refusal(spec, depth, "there is no layer 0, layers count from 1")
    if abs(number) > depth:
        raise _refusal(spec, depth, f"layer {number} is beyond the last one")
    return number if number > 0 else depth + 1 + number


def _refusal(spec: object, depth: int, why: str) -> ValueError:
    return ValueError(
        f"layers {spec!r}: {why}; the encoder has {depth} layers; "
        f"valid: 1 to {depth}, -1 to -{depth}, 'first-last', 'all', 'half', or a list of those"
    )


def describe_layers(layers: Iterable[int]) -> str:
    """Layers in short for a table: (1, 2, 3, 7) -> "1-3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
