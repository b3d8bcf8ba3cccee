"""Ranges of a model's blocks, as settings and files write them."""

from __future__ import annotations

MOST_BLOCKS = 100_000
"""More than any model has: ranges of blocks may come from a stranger's file."""


def layer_numbers(text: str) -> frozenset[int]:
    """The block numbers that a range such as "0-5,11" names.

    Raises:
        ValueError: the text is not a list of numbers and ranges.
    """
    return frozenset(block_order(text))


def block_order(text: str) -> tuple[int, ...]:
    """The block numbers that ranges such as "0-3,2-4" name, one after the other.

    Raises:
        ValueError: the text is not a list of numbers and ranges.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"layers {text!r} is not a list of blocks such as '0-5,11'")
        stop = int(last) if dash else int(first)
        if stop >= MOST_BLOCKS:
            raise ValueError(f"layers {text!r} goes beyond block {MOST_BLOCKS}, the last thinkable")
        if stop < int(first):
            raise ValueError(f"layers {text!r} has a range that ends before it starts")
        numbers += range(int(first), stop + 1)
    return tuple(numbers)
