"""The standing buffers of slots: A, B and biases of the layers that read one input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import RouteError
from lorakit.kernels import grouped
from lorakit.kernels.grouping import Grouping, group_rows
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.batch_rows import check_rows_first
from lorakit.layers.operation import Operation, Update
from lorakit.methods.lora.lora import LowRank, matrix_shape
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.routing.row_updates import KeptProjection, add_to_rows, bias_shift, write_sum

LowRanks = list[tuple[LowRank, float]]
"""A's and B's of one layer, with their adapters' weights."""


@dataclass
class SlotContent:
    """The content of a slot: its terms, sorted by layer."""

    parts: dict[int, LowRanks] = field(default_factory=dict)
    biases: dict[int, list[tuple[LoRAUpdate, float]]] = field(default_factory=dict)
    others: list[tuple[dict[int, Update], float]] = field(default_factory=list)
    """The updates that are no sum of B·A·x and a bias, by adapter."""

    def ranks(self) -> dict[int, int]:
        """The rank that each layer needs; 0 for a bias alone."""
        touched = dict.fromkeys((*self.parts, *self.biases), 0)
        return touched | {n: sum(p.site.rank for p, _ in own) for n, own in self.parts.items()}

    def dtypes(self) -> set[torch.dtype]:
        """The precisions of A and B."""
        return {part.lora_a.dtype for own in self.parts.values() for part, _ in own}


class InputSlots:
    """The buffers of those layers that read one input: one matmul with all their A's.

    Args:
        ranks: of each layer, by its number.
        layers: all of the model's, by number.
        count: the number of slots.
        make: precision and device of the buffers.
        changed: is called when operations that were made before lack a buffer.
    """

    def __init__(
        self,
        ranks: Mapping[int, int],
        layers: Mapping[int, AdaptedLayer],
        count: int,
        make: Mapping[str, Any],
        changed: Callable[[], None],
    ) -> None:
        self.ranks = dict(sorted(ranks.items()))
        self._layers, self._count, self._make = layers, count, make
        self._changed = changed
        _, d_in = matrix_shape(layers[next(iter(self.ranks))])
        self._a = torch.zeros(count, sum(self.ranks.values()), d_in, **self._make)
        self._b = {
            number: torch.zeros(count, rank, matrix_shape(layers[number])[0], **self._make)
            for number, rank in self.ranks.items()
        }
        self._shift: dict[int, Tensor] = {}
        self._columns: dict[int, slice] = {}
        start = 0
        for number, rank in self.ranks.items():
            self._columns[number] = slice(start, start + rank)
            start += rank

    @staticmethod
    def wider(
        old: InputSlots | None,
        ranks: Mapping[int, int],
        layers: Mapping[int, AdaptedLayer],
        **how: Any,
    ) -> InputSlots:
        """Buffers of at least these ranks, with what others hold."""
        before = {} if old is None else old.ranks
        most = {n: max(before.get(n, 0), ranks.get(n, 0)) for n in (before | dict(ranks))}
        made = InputSlots(most, layers, **how)
        for number, rank in before.items():
            assert old is not None
            start = made._columns[number].start
            made._a[:, start : start + rank] = old._a[:, old._columns[number]]
            made._b[number][:, :rank] = old._b[number]
            if number in old._shift:
                made._shift[number] = old._shift[number]
        return made

    @property
    def size_bytes(self) -> int:
        """The memory of the buffers."""
        return sum(x.nbytes for x in (self._a, *self._b.values(), *self._shift.values()))

    @property
    def layout(self) -> tuple[object, ...]:
        """The layers' ranks, and those that have biases."""
        return (*self.ranks.items(), *sorted(self._shift))

    def has_room(self, ranks: Mapping[int, int]) -> bool:
        """Whether these ranks fit."""
        return all(self.ranks.get(number, -1) >= rank for number, rank in ranks.items())

    @torch.no_grad()
    def write(self, slot: int, content: SlotContent) -> None:
        """Have a slot hold what its layers have; B is zero where there is nothing."""
        for number in self.ranks:
            a, b = self._a[slot, self._columns[number]], self._b[number][slot]
            write_sum(a, b, content.parts.get(number, ()))
            self._write_shift(slot, number, content.biases.get(number))

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Have a slot hold nothing but zeros."""
        for buffer in (self._a, *self._b.values(), *self._shift.values()):
            buffer[slot] = 0

    def _write_shift(
        self, slot: int, number: int, biases: Sequence[tuple[LoRAUpdate, float]] | None
    ) -> None:
        if biases is None:
            if number in self._shift:
                self._shift[number][slot] = 0
            return
        layer = self._layers[number]
        if number not in self._shift:
            self._shift[number] = torch.zeros(self._count, matrix_shape(layer)[0], **self._make)
            self._changed()
        self._shift[number][slot] = bias_shift(layer, biases)

    def operations(self, slots: Sequence[int]) -> dict[int, Operation]:
        """The operations of these layers on rows that use some slots; -1: none."""
        index: Sequence[int] = slots
        at: Any = slice(None)
        if follow_each_other(slots):
            # What is in the buffers is used there, also what is written later.
            index, at = range(len(slots)), slice(slots[0], slots[0] + len(slots))
        grouping = group_rows(index, device=self._a.device, dtype=self._a.dtype)
        if not grouping.groups:
            return {}
        shared = _SharedInput(grouped.gather(self._a[at], grouping), grouping, len(self.ranks))
        return {
            number: _SlotUpdate(
                shared,
                self._columns[number],
                grouped.gather(self._b[number][at], grouping),
                _of_rows(self._shift[number][at], index) if number in self._shift else None,
            )
            for number in self.ranks
        }


def _of_rows(shift: Tensor, index: Sequence[int]) -> Tensor:
    """The shift of each row, (rows, d_out), of those of the slots; -1: none."""
    if isinstance(index, range):
        return shift
    return torch.cat([shift, torch.zeros_like(shift[:1])])[list(index)]


class _SharedInput:
    """The down-projection of an input that several layers read."""

    def __init__(self, a: Tensor, grouping: Grouping, layers: int) -> None:
        self.grouping = grouping
        self._a = a
        self._kept = KeptProjection(layers)

    def down_project(self, x: Tensor) -> Tensor:
        """A·x, (rows, tokens, ranks of all layers)."""
        return self._kept.of(x, lambda: grouped.down_project(x, self._a, self.grouping))


class _SlotUpdate(Operation):
    """The low-rank updates of a linear layer's rows, each that of its slot."""

    def __init__(
        self, shared: _SharedInput, columns: slice, b: Tensor, shift: Tensor | None
    ) -> None:
        self._shared, self._columns, self._b, self._shift = shared, columns, b, shift

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with each row's own update added."""
        x, rows = inputs[0], self._shared.grouping.rows
        if rows > 1:
            check_rows_first(cast(AdaptedLayer, layer), x, rows)
        h = self._shared.down_project(x)[..., self._columns]
        output = grouped.up_project_onto(output, h, self._b, self._shared.grouping)
        return output if self._shift is None else add_to_rows(output, self._shift)

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The base's own parameter, for the layer's own call.

        Raises:
            RouteError: the model reads it by itself.
        """
        if inside:
            return weight
        raise RouteError(
            "an adapted layer has a weight that the model reads by itself, once for all rows: its "
            "adapter can't be in a slot"
        )


def follow_each_other(slots: Sequence[int]) -> bool:
    """Whether each slot is the one after the slot before it."""
    return slots[0] >= 0 and list(slots) == list(range(slots[0], slots[0] + len(slots)))
