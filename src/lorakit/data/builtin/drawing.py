"""Rows of a built-in task drawn from its grammar: distinct, and the same for the same seed."""

import random
from collections.abc import Callable
from typing import Literal, get_args

from lorakit.data.row_types import PromptRow
from lorakit.errors import DataError

Split = Literal["train", "validation", "test"]

COUNTS: dict[Split, int] = {"train": 2000, "validation": 200, "test": 200}
"""Rows of each split of a built-in task."""

Draw = Callable[[random.Random, Split], PromptRow]
"""A function that makes one row of a split from a random generator."""


def draw_rows(draw: Draw, split: str, *, seed: int) -> tuple[PromptRow, ...]:
    """The rows of a split, no prompt twice.

    Raises:
        DataError: there is no such split.
    """
    for known in get_args(Split):
        if split == known:
            return _distinct(draw, known, random.Random(f"{seed} {known}"))
    raise DataError(f"No split is called {split!r}. The splits are {', '.join(get_args(Split))}.")


def _distinct(draw: Draw, split: Split, rng: random.Random) -> tuple[PromptRow, ...]:
    rows: dict[str, PromptRow] = {}
    while len(rows) < COUNTS[split]:
        row = draw(rng, split)
        rows.setdefault(row.prompt, row)
    return tuple(rows.values())
