"""Where the virtual tokens of a batch are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """The positions of a batch's virtual tokens."""

    numbers: Int[Tensor, "rows tokens"]
    """The number of each virtual token, and less than 0 for all others."""
    embedded: bool = False
    """Whether the input embedding was given these tokens in its latest call."""

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = (self.numbers >= 0).nonzero(as_tuple=True)
        return rows, columns, self.numbers[rows, columns]

    def of_rows(self, rows: Int[Tensor, " chosen"]) -> TokenPositions:
        """The positions in some of the rows."""
        return TokenPositions(self.numbers[rows], self.embedded)

    def rows_with_tokens(self) -> list[bool]:
        """Whether each row has virtual tokens."""
        return (self.numbers >= 0).any(1).tolist()

    def put(self, vectors: Tensor, output: Tensor) -> Tensor:
        """A layer's output (rows, tokens, d) with vectors (count, d) at the positions."""
        rows, columns, numbers = self._entries
        # The gradient of F.embedding sums up in the same order each time, on GPUs too.
        values = F.embedding(numbers, vectors).to(output.dtype)
        return output.index_put((rows, columns), values)
