"""Decode steps of all slots: eager ones, and what other kinds of them have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorakit.errors import ModelError
from lorakit.serving.decoder import Decoder, difference
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.kv_slots import KeyValueSlots


@dataclass(frozen=True)
class Shapes:
    """The sizes of a step's tensors: code, or a CUDA graph, is for one of these."""

    rows: int
    """A power of two, or all slots."""
    window: int
    """The columns of keys and values that are seen, a power of two."""
    columns: int
    """Those of the buffers."""
    layout: tuple[object, ...]
    """Of the slots' A and B."""

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.window} tokens"


OTHERS = "an adapter that is no sum of B·A·x, or of a rank beyond slot_rank"
"""Why steps with some rows are eager: their operations depend on which rows have them."""


class Steps:
    """Computes decode steps, eagerly.

    Args:
        decoder: calls the model.
        slots: A and B of the rows.
        keys_and_values: of the rows.
    """

    def __init__(self, decoder: Decoder, slots: HeldSlots, keys_and_values: KeyValueSlots) -> None:
        self._decoder, self._slots, self._states = decoder, slots, keys_and_values
        self.counts: Counter[str] = Counter()
        """Steps so far: compiled or recorded, or the reason why they were eager."""

    def step(self, tokens: Sequence[int], used: Sequence[int]) -> Tensor:
        """The logits (rows, vocabulary) after one token more of each of the first slots.

        Args:
            tokens: of those slots.
            used: the slots whose logits are wanted.
        """
        return self._counted("off", tokens)

    def _counted(self, reason: str, tokens: Sequence[int]) -> Tensor:
        """An eager step, for a reason."""
        self.counts[reason] += 1
        return self._eager(tokens)

    def _eager(self, tokens: Sequence[int]) -> Tensor:
        with self._slots.used(0, len(tokens)):
            return self._decoder.step(tokens, self._states)

    def warm_up(self) -> None:
        """Get ready before the first request."""

    def close(self) -> None:
        """End what goes on beside the steps."""

    def _padded(self, rows: int) -> int:
        """The rows of a step that is computed for so many: a power of two, or all slots."""
        return min(1 << (rows - 1).bit_length(), self._slots.count)


class ProvenSteps(Steps):
    """Steps in a faster form, which is used for shapes once it has the logits of an eager step.

    Args:
        decoder: calls the model.
        slots: A and B of the rows.
        keys_and_values: of the rows.
        note: is told what has no such form.
    """

    form: ClassVar[str]
    """The word for it, under which steps are counted."""
    making: ClassVar[str]
    """The word under which eager steps are counted that lead to it."""

    def __init__(
        self,
        decoder: Decoder,
        slots: HeldSlots,
        keys_and_values: KeyValueSlots,
        *,
        note: Callable[[str], None],
    ) -> None:
        super().__init__(decoder, slots, keys_and_values)
        self._note = note
        self._refused: dict[Shapes, str] = {}

    def _compared(self, found: Tensor, tokens: Sequence[int], used: Sequence[int]) -> Tensor:
        """The logits of an eager step, which writes the same column once more.

        Raises:
            ModelError: the others are not equal to rounding.
        """
        expected = self._counted(self.making, tokens)
        problem = difference(found[list(used)], expected[list(used)])
        if problem:
            raise ModelError(problem)
        return expected

    def _refuse(self, shapes: Shapes, error: Exception) -> None:
        """Have steps of these shapes be eager for good."""
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._refused[shapes] = reason
        self._note(f"decode steps of {shapes} are not {self.form}: {reason}")
