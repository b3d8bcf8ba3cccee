"""A standing batch whose rows, the slots, change their adapters one at a time.

A and B of all slots are in buffers that stay, so a row that comes writes its own slot, a row that
goes writes nothing, and the operations of a step in which neither happens are those of the last.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lorakit.attachment.state import Attachment, attachment_for
from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Operation, Update
from lorakit.layers.route import Frame
from lorakit.methods.lora.lora import is_linear
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.methods.prompt.prefix import TokenVectors
from lorakit.models.base import device_of
from lorakit.routing.choices import RowChoices
from lorakit.routing.flattened import RowsOfTokens, flattened
from lorakit.routing.input_slots import InputSlots, SlotContent, follow_each_other
from lorakit.routing.stacked_lora import is_sum, mixed_operations

Terms = Sequence[tuple[Mapping[int, Update], float]]
"""What one slot uses: the updates of adapters by the layer's number, with their weights."""
ALONE = (
    "an adapter with virtual tokens can't be combined with others, or weakened: its rows have other"
    " tokens than theirs; name it alone"
)
"""Why such an adapter is no part of a sum."""


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
        self._wide: WeakValueDictionary[int, _Wide] = WeakValueDictionary()
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
        """Have each row use one of some slots, in any order, as `used` does.

        Slots that do not follow each other are copied for this one block.
        """
        return self._state.route.own.pushed(self._frame(slots))

    def reading(self, slot: int, terms: Terms) -> Any:
        """Have the model's one row, a prompt or a part of it, use a slot and its virtual tokens.

        Args:
            slot: of the row.
            terms: what it holds; the row has the virtual tokens of these already, by their ids.
        """
        own = {n: u for updates, _ in terms for n, u in updates.items() if _is_virtual(u)}
        frame = self._frame([slot])
        if own:
            frame = replace(frame, operations={**(frame.operations or {}), **own}, key=object())
        return self._state.route.own.pushed(frame)

    def used_in_parts(self, parts: Sequence[tuple[Sequence[int], int]]) -> Any:
        """Have the tokens of one flattened row use slots, as `used` does.

        Args:
            parts: of the row, one after the other: some slots, and the number of tokens of each.
        """
        made = [RowsOfTokens(self._frame(slots), len(slots), tokens) for slots, tokens in parts]
        return self._state.route.own.pushed(flattened(made))

    def _frame(self, slots: Sequence[int]) -> Frame:
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
        """The content of a slot with some terms.

        Raises:
            RouteError: some have no slots.
        """
        layers, content = self._state.layers, SlotContent()
        for updates, weight in terms:
            by_path = {layers[n].adapter_path: u for n, u in updates.items()}
            check_slots(self._state, by_path, virtual_tokens=self._virtual_tokens)
            if any(map(_is_virtual, updates.values())) and (len(terms) > 1 or weight != 1):
                raise RouteError(ALONE)
        by_layer: dict[int, list[tuple[int, Update, float]]] = {}
        for at, (updates, weight) in enumerate(terms):
            for number, update in updates.items():
                if not _is_virtual(update):
                    by_layer.setdefault(number, []).append((at, update, weight))
        others: list[dict[int, Update]] = [{} for _ in terms]
        for number, own in by_layer.items():
            of_rows = is_linear(layers[number]) and layers[number].adapter_experts is None
            sums = of_rows and all(is_sum(update) for _, update, _ in own)
            if sums and self._is_narrow([cast(LoRAUpdate, update) for _, update, _ in own]):
                _add_sums(content, number, [(cast(LoRAUpdate, u), w) for _, u, w in own])
            else:
                # A sum beside an update that rescales the output would be rescaled too.
                for at, update, _ in own:
                    others[at][number] = self._alone(update) if sums else update
        pairs = zip(others, terms, strict=True)
        content.others = [(own, weight) for own, (_, weight) in pairs if own]
        return content

    def _is_narrow(self, updates: Iterable[LoRAUpdate]) -> bool:
        """Whether the sum of some updates of a layer may be in the buffers."""
        ranks = (part.site.rank for update in updates for part in update.parts.values())
        return self._most_rank is None or sum(ranks) <= self._most_rank

    def _alone(self, update: Update) -> Update:
        """A sum that is not in the buffers: the same one for all slots that use it."""
        found = self._wide.get(id(update))
        if found is None:
            found = _Wide(cast(LoRAUpdate, update), self._dtype)
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


def check_slots(
    state: Attachment, updates: Mapping[str, Update], *, virtual_tokens: bool = False
) -> None:
    """Refuse an adapter that rows can't have in slots.

    Args:
        state: of the model.
        updates: of the adapter, by module path.
        virtual_tokens: whether it may have these, see `Slots`.

    Raises:
        RouteError: with the reason, and the first such layer.
    """
    for path, update in updates.items():
        reason = state.base.for_all_rows.get(path)
        if update.virtual_tokens and not virtual_tokens:
            reason = "virtual tokens would move the row's other tokens"
        elif update.is_whole and not _is_virtual(update):
            reason = "it has virtual tokens, and changes the input embedding beside them"
        if reason:
            raise RouteError(f"an adapter of {path or 'the model'} can't be in a slot: {reason}")


def _is_virtual(update: Update) -> bool:
    """Whether an update is that of virtual tokens alone."""
    return isinstance(update, TokenVectors)


def _add_sums(content: SlotContent, number: int, own: Sequence[tuple[LoRAUpdate, float]]) -> None:
    parts = [(part, w) for update, w in own for part in update.parts.values() if w]
    biases = [(update, w) for update, w in own if update.has_shift and w]
    if parts:
        content.parts[number] = parts
    if biases:
        content.biases[number] = biases


class _Wide(LoRAUpdate):
    """A low-rank update without buffers, in the precision that these have.

    It is none of those that are stacked, which would copy it for each range of slots.
    """

    def __init__(self, update: LoRAUpdate, dtype: torch.dtype | None) -> None:
        own = update
        if dtype is not None and any(p.dtype != dtype for p in update.parameters()):
            own = copy.deepcopy(update).to(dtype)
        super().__init__(own.parts, own.bias)
        self._given = (update,)
        """Kept, as long as its id stands for it."""

    @property
    def is_additive(self) -> bool:
        """Whether it may be stacked."""
        return False

    def added(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Tensor,
        *,
        weight: float,
        base: Tensor,
    ) -> Tensor:
        """The output with weight times the update."""
        return self._changed(layer, inputs[0], output, weight)


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
