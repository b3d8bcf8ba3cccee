"""Packed sequences: where the tokens of each are in a batch, and which are computed together.

A **packed sequence** is a run of tokens that attends only to itself. A row of a batch holds one or
more of them, from its first token on; the rest of the row is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorakit.kernels.stand_in import with_values

LARGEST_LENGTH_RATIO = 1.3
"""The longest sequence of a group has at most so many times the tokens of the shortest.

The matmuls of a group are padded to its longest sequence. On CPUs, for sequences of 40 to 90
tokens, one group for all takes 1.5 to 2 times as long, and a group for each about as long.
"""

FEW_SIZES = 16
"""Sizes that differ from batch to batch are rounded up to a multiple of this.

oneDNN compiles code for each new size of a matmul and keeps it: 10 MB in each step, for batches
whose sizes never occur again.
"""


@dataclass(frozen=True)
class PackedSequences:
    """The packed sequences of a batch."""

    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each packed sequence, by row."""
    width: int
    """Tokens of a row, padding included."""
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def stacked(parts: Sequence[PackedSequences]) -> PackedSequences:
        """The packed sequences of batches whose rows are joined into one, padded to the widest."""
        lengths = tuple(row for part in parts for row in part.lengths)
        return PackedSequences(lengths, max(part.width for part in parts))

    @property
    def tokens(self) -> int:
        """The number of tokens without padding."""
        return sum(map(sum, self.lengths))

    @property
    def places(self) -> int:
        """The number of tokens, padding included."""
        return len(self.lengths) * self.width

    @property
    def longest(self) -> int:
        """The tokens of the longest packed sequence."""
        return max(length for row in self.lengths for length in row)

    def groups(self, device: torch.device) -> tuple[Group, ...]:
        """The packed sequences in groups of similar length."""
        if device not in self._made:
            self._made[device] = tuple(Group(spans, device) for spans in self._grouped())
        return self._made[device]

    def _grouped(self) -> list[list[tuple[int, int]]]:
        """The first token and the length of each packed sequence, by group."""
        spans = []
        for row, lengths in enumerate(self.lengths):
            start = row * self.width
            for length in lengths:
                spans.append((start, length))
                start += length
        groups: list[list[tuple[int, int]]] = []
        for start, length in sorted(spans, key=lambda span: -span[1]):
            if not groups or groups[-1][0][1] > LARGEST_LENGTH_RATIO * length:
                groups.append([])
            groups[-1].append((start, length))
        return groups


class Group:
    """Packed sequences of similar length, which one batched matmul computes."""

    def __init__(self, spans: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._device, device = device, with_values(device)
        starts, lengths = torch.tensor(spans, device=device).T[:, :, None]
        self.count = len(spans)
        longest = max(length for _, length in spans)
        self.longest = longest + -longest % FEW_SIZES
        steps = torch.arange(self.longest, device=device)
        self.real = steps < lengths
        """Whether a position of (count, longest) is within its packed sequence."""
        # A position beyond the end repeats the sequence's own last token, so that no value of
        # another sequence, not even a NaN, can get in.
        self.tokens = starts + torch.minimum(steps, lengths - 1)
        """The token at each position, counted through the rows of the batch."""
        self.even = bool(self.real.all())
        self._made: dict[Any, Any] = {}

    def vectors(self, heads: int, share: int, places: int) -> Vectors:
        """The positions of the vectors of heads, if `share` query heads use one head of k and v.

        Args:
            heads: heads of k and v.
            share: query heads of each; 1 for k and v themselves.
            places: tokens of the batch, padding included.
        """
        key = (heads, share, places)
        if key not in self._made:
            self._made[key] = Vectors.of(self, heads, share, places).on(self._device)
        return self._made[key]

    def mask(
        self, dtype: torch.dtype, *, causal: bool, window: int | None
    ) -> Float[Tensor, "sequences one longest longest"] | None:
        """The mask that is added to scores: minus infinity where a query does not see a key.

        Args:
            dtype: its precision.
            causal: a token does not see those after it.
            window: it sees at most so many, itself included; None: all.

        Returns:
            None, where each token sees the whole packed sequence. Every query sees a key.
        """
        key = (dtype, causal, window)
        if key not in self._made:
            seen = self._seen(causal, window)
            zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            mask = zeros.masked_fill_(~seen, float("-inf"))[:, None].to(self._device)
            self._made[key] = None if bool(seen.all()) else mask
        return self._made[key]

    def _seen(self, causal: bool, window: int | None) -> Bool[Tensor, "sequences longest longest"]:
        steps = torch.arange(self.longest, device=self.tokens.device)
        if not causal:
            return self.real[:, None, :].expand(-1, self.longest, -1)
        back = steps[:, None] - steps
        # Positions beyond the end come after all real queries.
        return ((back >= 0) & (back < (window or self.longest)))[None]


@dataclass(frozen=True)
class Vectors:
    """The positions of a group's vectors in a table (tokens·heads, d), in the order of the matmuls.

    That order is head of k and v, sequence, query head that shares it, position in the sequence.
    """

    source: Int[Tensor, " vectors"]
    """A row of the table."""
    target: Int[Tensor, " vectors"]
    """The same, but one row past the table's end for positions beyond a sequence's end."""
    beyond: Int[Tensor, " beyond"]
    """Which vectors those are."""
    shape: tuple[int, int]
    """Matmuls at once, and vectors in each."""

    @staticmethod
    def of(group: Group, heads: int, share: int, places: int) -> Vectors:
        """The vectors of a group of packed sequences; the arguments are those of `vectors`."""
        device = group.tokens.device
        head = torch.arange(heads * share, device=device).view(heads, 1, share, 1)
        source = group.tokens[:, None, :] * (heads * share) + head
        real = group.real[:, None, :].expand_as(source).flatten()
        source = source.flatten()
        return Vectors(
            source=source,
            target=torch.where(real, source, places * heads * share),
            beyond=(~real).nonzero()[:, 0],
            shape=(heads * group.count, share * group.longest),
        )

    def on(self, device: torch.device) -> Vectors:
        """The same positions on a device."""
        source, target, beyond = (x.to(device) for x in (self.source, self.target, self.beyond))
        return Vectors(source, target, beyond, self.shape)

    def gather(self, table: Float[Tensor, "rows d"]) -> Float[Tensor, "matmuls vectors d"]:
        """The vectors; beyond a sequence's end, those of its last token."""
        return table.index_select(0, self.source).view(*self.shape, -1)

    def gather_or_zero(self, table: Float[Tensor, "rows d"]) -> Float[Tensor, "matmuls vectors d"]:
        """The vectors; zero beyond a sequence's end, as the gradients of unused values."""
        found = table.index_select(0, self.source)
        if len(self.beyond):
            found.index_fill_(0, self.beyond, 0)
        return found.view(*self.shape, -1)

    def scatter(
        self, values: Float[Tensor, "matmuls vectors d"], table: Float[Tensor, "more_rows d"]
    ) -> None:
        """Write vectors to where they belong in a table that has one row more."""
        table.index_copy_(0, self.target, values.flatten(0, 1))
