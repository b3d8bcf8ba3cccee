"""Which tokens of a batch are trained ones: noted for the time of one call of the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Placed:
    """Where the virtual tokens of a batch stand."""

    numbers: Int[Tensor, "rows tokens"]
    """The number of each virtual token, and less than 0 for all others."""

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = (self.numbers >= 0).nonzero(as_tuple=True)
        return rows, columns, self.numbers[rows, columns]

    def of_rows(self, rows: Int[Tensor, " chosen"]) -> Placed:
        """The same of some rows."""
        return Placed(self.numbers[rows])

    def rows_with_tokens(self) -> list[bool]:
        """Return which rows have virtual tokens."""
        return (self.numbers >= 0).any(1).tolist()

    def put(self, vectors: Tensor, output: Tensor) -> Tensor:
        """A layer's output (rows, tokens, d) with vectors (count, d) at their places."""
        rows, columns, numbers = self._entries
        # The gradient of F.embedding sums up in the same order each time, on GPUs too.
        values = F.embedding(numbers, vectors).to(output.dtype)
        return output.index_put((rows, columns), values)


class Prompted(threading.local):
    """What each thread knows of the calls of a model that it is in; a copy knows of none."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        """What was noted of each call, the innermost last."""
        self.rows: Tensor | None = None
        """The rows that a layer's change is about at the moment; None: all."""
        self.here = False
        """Whether the input embedding was given virtual tokens."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompted, ()

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Let what is asked be about some rows of the batch, inside a block."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def narrowed(self, placed: Placed | None) -> Placed | None:
        """Return what is said of the rows at hand."""
        return placed if placed is None or self.rows is None else placed.of_rows(self.rows)
