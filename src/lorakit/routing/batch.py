"""What each row of a batch uses: adapters by name and strength, and their updates of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.layers.layer import Update

Combination = tuple[tuple[str, float], ...]
"""The adapters that one row uses, each with its strength; empty: the base."""


@dataclass(frozen=True)
class Batch:
    """Which blend each row of a batch uses."""

    combinations: tuple[Combination, ...]
    """The distinct ones that are not empty, called slots below."""
    slot_of_row: tuple[int, ...]
    """A place in `blends`; -1: the base."""

    @staticmethod
    def of(rows: Sequence[Combination]) -> Batch:
        """The batch with these rows."""
        combinations = tuple(dict.fromkeys(combination for combination in rows if combination))
        place = {combination: slot for slot, combination in enumerate(combinations)}
        return Batch(combinations, tuple(place.get(combination, -1) for combination in rows))

    def only(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Each row's place among some of the slots; -1 where it is not among them."""
        place = {slot: at for at, slot in enumerate(slots)}
        return tuple(place.get(slot, -1) for slot in self.slot_of_row)


Updates = Mapping[str, Mapping[int, Update]]
"""The updates of each adapter, by its name and the layer's number."""

Terms = dict[int, list[tuple[Update, float]]]
"""Of one layer: for each slot that touches it, the updates and their strengths."""
