"""A standing batch whose rows, the slots, change their adapters one at a time.

A and B of all slots are in buffers that stay, so a row that comes writes its own slot, a row that
goes writes nothing, and the operations of a step in which neither happens are those of the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lorakit.attachment.state import attachment_for
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Operation, Update
from lorakit.layers.route import Frame
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.models.base import device_of
from lorakit.routing.choices import RowChoices
from lorakit.routing.flattened import RowsOfTokens, flattened
from lorakit.routing.input_slots import InputSlots, SlotContent, follow_each_other
from lorakit.routing.slot_content import Terms, WideUpdate, has_rows, is_virtual, slot_content
from lorakit.routing.stacked_lora import is_sum, mixed_operations


class Slots:
    """The adapters of a batch of so many rows, one slot a row.

    Low-rank updates and biases of linear layers are in standing buffers, whose ranks are those of
    the widest slot so far. Other updates (DoRA, embeddings, convolutions, heads, ranks beyond a
    limit) are computed one adapter after the other, and make the operations anew when their slot
    changes. Virtual tokens are of prompts:
    a row whose prompt was read with `reading` has them among its keys and values, and its slot
    holds what else its adapter has. Where a model reads an adapted weight without a call, its call
    is an error.

    Args:
        model: the base, whose adapters it holds.
        count: the number of slots.
        dtype: of A and B in the buffers, in which the updates are computed; None: float32, or
            float64 on a base of that precision.
        few_ranks: round the buffers' ranks up to powers of two, so that they seldom change.
        virtual_tokens: let adapters have these, as prompts are read with `reading`.
        most_rank: the largest rank that buffers have; what has more takes no memory and no time of
            other slots. None: there is no limit.

    Examples:
        >>> slots = Slots(model, 16)  # doctest: +SKIP
        >>> slots.join(3, [(updates, 1.0)])  # doctest: +SKIP
        >>> with slots.used(0, 4):  # doctest: +SKIP
        ...     logits = model(**batch_of_four_rows).logits
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
        self.count = count
        self._model = model
        self._state = attachment_for(model)
        self._dtype, self._few_ranks = dtype, few_ranks
        self._virtual_tokens, self._most_rank = virtual_tokens, most_rank
        self._wide: WeakValueDictionary[int, WideUpdate] = WeakValueDictionary()
        """By the id of the update that each is of."""
        self._inputs: dict[str, InputSlots] = {}
        """By the word for the input that their layers read."""
        self._others: dict[int, list[tuple[dict[int, Update], float]]] = {}
        self._frames: dict[tuple[int, int], Frame] = {}

    @property
    def size_bytes(self) -> int:
        """The memory of the buffers."""
        return sum(buffers.size_bytes for buffers in self._inputs.values())

    def join(self, slot: int, terms: Terms) -> None:
        """Have a slot use adapters from now on; without any, the base.

        Raises:
            RouteError: an adapter cannot be in a slot; nothing changes.
        """
        content = self._content(terms)
        self._make_room(content)
        for buffers in self._inputs.values():
            buffers.write(slot, content)
        if content.others or slot in self._others:
            self._others.pop(slot, None)
            if content.others:
                self._others[slot] = content.others
            self._frames.clear()

    def clear(self, slot: int) -> None:
        """Write zeros over what the buffers have for a slot, also where no rank is in use."""
        for buffers in self._inputs.values():
            buffers.clear(slot)

    @property
    def layout(self) -> tuple[object, ...]:
        """The layers that have buffers and their ranks: another one, and buffers are others too."""
        return tuple(self._inputs[word].layout for word in sorted(self._inputs))

    def has_others(self, slots: Iterable[int]) -> bool:
        """Whether one of these slots has updates for which there are no buffers."""
        return any(slot in self._others for slot in slots)

    def standing(self, start: int, stop: int) -> Frame:
        """A fresh frame of what the buffers of some slots hold, for another thread."""
        operations = self._standing(range(start, stop))
        return Frame(operations or None, rows=stop - start, key=object())

    def _standing(self, slots: Sequence[int]) -> dict[int, Operation]:
        operations: dict[int, Operation] = {}
        for buffers in self._inputs.values():
            operations |= buffers.operations(slots)
        return operations

    def reserve(self, terms: Terms) -> None:
        """Make the buffers wide enough for adapters that are to come.

        Raises:
            RouteError: an adapter cannot be in a slot.
        """
        self._make_room(self._content(terms))

    def check(self, terms: Terms) -> None:
        """Make sure that adapters can be in a slot.

        Raises:
            RouteError: they cannot.
        """
        content = self._content(terms)
        if content.others:
            self._other_operations({0: content.others}, range(1))

    def used(self, start: int, stop: int) -> Any:
        """Have the model's rows use these slots, in the running thread, inside a `with` block."""
        return self.used_by(range(start, stop))

    def used_by(self, slots: Sequence[int]) -> Any:
        """Have each row use one of some slots, in any order, as `used` does (see `frame`)."""
        return self._state.route.own.pushed(self.frame(slots))

    def reading(self, slot: int, terms: Terms) -> Any:
        """Have the model's one row, a prompt or a part of it, use a slot and its virtual tokens.

        Args:
            slot: of the row.
            terms: what it holds; the row has the virtual tokens of these already, by their ids.
        """
        own = {n: u for updates, _ in terms for n, u in updates.items() if is_virtual(u)}
        frame = self.frame([slot])
        if own:
            frame = replace(frame, operations={**(frame.operations or {}), **own}, key=object())
        return self._state.route.own.pushed(frame)

    def used_in_parts(self, parts: Sequence[tuple[Sequence[int], int]]) -> Any:
        """Have the tokens of one flattened row use slots, as `used` does.

        Args:
            parts: of the row, one after the other: some slots, and the number of tokens of each.
        """
        made = [RowsOfTokens(self.frame(slots), len(slots), tokens) for slots, tokens in parts]
        return self._state.route.own.pushed(flattened(made))

    def frame(self, slots: Sequence[int]) -> Frame:
        """The frame in which each row of a batch uses one of some slots.

        Where slots do not follow each other, it has copies of what they hold now.

        Args:
            slots: of the rows, in any order; one may be there several times, and -1 is the base.
        """
        between = slots[0], slots[0] + len(slots)
        if not follow_each_other(slots):
            return self._made(slots)
        if between not in self._frames:
            self._frames[between] = self._made(slots)
        return self._frames[between]

    def _made(self, slots: Sequence[int]) -> Frame:
        operations = self._standing(slots)
        for number, other in self._other_operations(self._others, slots).items():
            own = operations.get(number)
            operations[number] = other if own is None else _InTurn(own, other)
        return Frame(operations or None, rows=len(slots), key=object())

    def _content(self, terms: Terms) -> SlotContent:
        """What a slot with some terms holds.

        Raises:
            RouteError: some can't be in a slot.
        """
        limit = self._most_rank
        content = slot_content(
            self._state, terms, virtual_tokens=self._virtual_tokens, most_rank=limit
        )
        if limit is not None:
            content.others = [
                ({number: self._alone(number, update) for number, update in own.items()}, weight)
                for own, weight in content.others
            ]
        return content

    def _alone(self, number: int, update: Update) -> Update:
        """An update that is not in the buffers: a sum is the same one for all slots that use it."""
        if not (has_rows(self._state.layers[number]) and is_sum(update)):
            return update
        found = self._wide.get(id(update))
        if found is None:
            found = WideUpdate(cast(LoRAUpdate, update), self._dtype)
            self._wide[id(update)] = found
        return found

    def _make_room(self, content: SlotContent) -> None:
        """Make the buffers wide enough for a slot's ranks."""
        by_input: dict[str, dict[int, int]] = {}
        for number, rank in content.ranks().items():
            if self._few_ranks and rank:
                rank = 1 << (rank - 1).bit_length()
            by_input.setdefault(self._state.layers[number].adapter_input, {})[number] = rank
        for word, ranks in by_input.items():
            buffers = self._inputs.get(word)
            if buffers is None or not buffers.has_room(ranks):
                first = self._state.layers[min(ranks)]
                self._inputs[word] = InputSlots.wider(
                    buffers,
                    ranks,
                    self._state.layers,
                    count=self.count,
                    make={"dtype": self.dtype_for(first), "device": self.device},
                    changed=self._frames.clear,
                )
                self._frames.clear()

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return device_of(self._model)

    def dtype_for(self, layer: AdaptedLayer) -> torch.dtype:
        """The precision of A and B of a layer."""
        if self._dtype is not None:
            return self._dtype
        double = cast(Tensor, layer.weight).dtype == torch.float64
        return torch.float64 if double else torch.float32

    def _other_operations(
        self,
        others: Mapping[int, list[tuple[dict[int, Update], float]]],
        slots: Sequence[int],
    ) -> dict[int, Operation]:
        """The operations of those updates of some slots that have no buffers."""
        updates: dict[str, Mapping[int, Update]] = {}
        choices: list[dict[str, float] | None] = []
        for slot in slots:
            named = {_name(own): (own, weight) for own, weight in others.get(slot, [])}
            updates |= {name: own for name, (own, _) in named.items()}
            choices.append({name: weight for name, (_, weight) in named.items()} or None)
        if not updates:
            return {}
        rows = RowChoices.of(choices, updates)
        return mixed_operations(dict(self._state.layers), updates, rows, self.device)


def _name(updates: Mapping[int, Update]) -> str:
    """A name that is the same for the same updates: rows of one adapter are computed together."""
    return " ".join(str(id(update)) for update in updates.values())


class _InTurn(Operation):
    """The updates in buffers, and then those of other rows."""

    def __init__(self, first: Operation, second: Operation) -> None:
        self._first, self._second = first, second

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The output with both."""
        return self._second.adapt(layer, inputs, self._first.adapt(layer, inputs, output))

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """A parameter, as both have it."""
        first = self._first.read(name, weight, inside=inside)
        return self._second.read(name, first, inside=inside)
