"""Slots that remember what they hold, so that the same adapters are not written again."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lorakit.routing.slots import Slots
from lorakit.serving.requests import Use


class HeldSlots(Slots):
    """The slots of an engine, each with the weights that it holds.

    Args:
        model: the base, whose adapters they hold.
        count: the number of slots.
        dtype: of A and B.
        few_ranks: see `Slots`.
        virtual_tokens: see `Slots`.
        most_rank: see `Slots`.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        *,
        dtype: torch.dtype | None = None,
        few_ranks: bool = False,
        virtual_tokens: bool = False,
        most_rank: int | None = None,
    ) -> None:
        super().__init__(
            model,
            count,
            dtype=dtype,
            few_ranks=few_ranks,
            virtual_tokens=virtual_tokens,
            most_rank=most_rank,
        )
        self._held: list[str | None] = [""] * count
        """By slot, the key of what it holds; None: unknown, after an error."""
        self._spoilt: set[int] = set()

    def place(self, use: Use, taken: Collection[int]) -> int:
        """A free slot: one that holds these weights already, or the lowest, since a step computes
        all slots up to the highest in use."""
        free = [slot for slot in range(self.count) if slot not in taken]
        near = [slot for slot in free if slot <= len(taken)]
        return next((slot for slot in near if self._held[slot] == use.key), free[0])

    def hold(self, slot: int, use: Use) -> None:
        """Have a slot hold these weights.

        Raises:
            RouteError: it can't.
        """
        if self._held[slot] == use.key:
            return
        if slot in self._spoilt:
            self.clear(slot)
            self._spoilt.discard(slot)
        self._held[slot] = None
        self.join(slot, use.terms)
        self._held[slot] = use.key

    def spoil(self, slot: int) -> None:
        """Have a slot be cleared before it holds anything else: it made numbers that are none.

        What is beyond the rank of the next adapter would be multiplied by zero, and NaN by it is
        NaN.
        """
        self._held[slot] = None
        self._spoilt.add(slot)
