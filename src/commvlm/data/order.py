"""Shuffled orders that are computed, not stored: which item stands at which place, in constant time and memory."""

from __future__ import annotations

from math import isqrt

_WORD = (1 << 64) - 1
_ROUNDS = 4


def mixed(*numbers: int) -> int:
    """Numbers -> one of 64 bits that looks random (splitmix64's finaliser, applied in a chain)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


def permuted(place: int, size: int, key: int) -> int:
    """The item at a place, both in range(size): for every key a permutation of them, in any size.

    A Feistel network over a rectangle a x b of at least `size` cells, a and b near its root: in each round the row moves by
    a number that the column gives, then the other way round, which is undone by moving back, so no two places meet. What
    falls on a cell beyond the size walks on until it does not (Black and Rogaway, 2002).
    """
    if not 0 <= place < size:
        raise IndexError(f"place {place} of an order of {size}")
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(place, columns)
        for turn in range(_ROUNDS):
            row = (row + mixed(key, 2 * turn, column)) % rows
            column = (column + mixed(key, 2 * turn + 1, row)) % columns
        place = row * columns + column
        if place < size:
            return place
