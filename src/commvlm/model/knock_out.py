"""What is switched off at inference: "dinov2" an encoder, "clip:3", "clip:1-8", "clip:all" some of its asked layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .layers import describe_layers, parse_layers
from .names import nearest

KnockOut = str | Sequence[str]
"""One entry, or several; a string may hold several, separated by commas."""


def parse_knock_out(
    knock_out: KnockOut | None, asked: Mapping[str, Sequence[int]], depths: Mapping[str, int]
) -> dict[str, frozenset[int]]:
    """Encoder -> places (0-based) among its asked layers that are off; an encoder that is off has all of them.

    asked: encoder -> its asked layers, ascending, 1-based. depths: encoder -> its blocks. Raises ValueError for an encoder
    that there is not, a layer that is not asked for, and where nothing is left on.
    """
    entries = [e for e in knock_out.split(",") if e.strip()] if isinstance(knock_out, str) else list(knock_out or ())
    off: dict[str, set[int]] = {name: set() for name in asked}
    for entry in entries:
        name, colon, spec = entry.strip().partition(":")
        if name not in asked:
            raise ValueError(f"knock_out {entry!r}: there is no encoder {name!r}; {nearest(name, list(asked))}")
        layers = asked[name]
        numbers = layers if not colon or spec == "all" else parse_layers(spec, depths[name])
        for number in numbers:
            if number not in layers:
                raise ValueError(
                    f"knock_out {entry!r}: layer {number} is not read; {name!r} reads layers {describe_layers(layers)}"
                )
            off[name].add(layers.index(number))
    if asked and all(len(off[name]) == len(layers) for name, layers in asked.items()):
        raise ValueError(f"knock_out {entries!r} leaves nothing on; for a blind model ask about a grey image")
    return {name: frozenset(places) for name, places in off.items()}
