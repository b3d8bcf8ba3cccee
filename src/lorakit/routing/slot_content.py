"""What the terms of a slot are: sums for its buffers, other updates, and virtual tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.attachment.state import Attachment
from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Update
from lorakit.methods.lora.lora import is_linear
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.methods.prompt.prefix import TokenVectors
from lorakit.routing.input_slots import SlotContent
from lorakit.routing.stacked_lora import is_sum

Terms = Sequence[tuple[Mapping[int, Update], float]]
"""What one slot uses: the updates of adapters by the layer's number, with their weights."""
ALONE = (
    "an adapter with virtual tokens can't be combined with others, or weakened: its rows have other"
    " tokens than theirs; name it alone"
)
"""Why such an adapter is no part of a sum."""


def slot_content(
    state: Attachment,
    terms: Terms,
    *,
    virtual_tokens: bool = False,
    most_rank: int | None = None,
) -> SlotContent:
    """What a slot with some terms holds.

    Args:
        state: of the model.
        terms: updates of adapters, with their weights.
        virtual_tokens: whether they may have these, which are left out; see `Slots`.
        most_rank: the largest rank of a sum in the buffers; None: there is no limit.

    Raises:
        RouteError: some can't be in a slot.
    """
    layers, content = state.layers, SlotContent()
    for updates, weight in terms:
        by_path = {layers[n].adapter_path: u for n, u in updates.items()}
        check_slots(state, by_path, virtual_tokens=virtual_tokens)
        if any(map(is_virtual, updates.values())) and (len(terms) > 1 or weight != 1):
            raise RouteError(ALONE)
    by_layer: dict[int, list[tuple[int, Update, float]]] = {}
    for at, (updates, weight) in enumerate(terms):
        for number, update in updates.items():
            if not is_virtual(update):
                by_layer.setdefault(number, []).append((at, update, weight))
    others: list[dict[int, Update]] = [{} for _ in terms]
    for number, own in by_layer.items():
        sums = has_rows(layers[number]) and all(is_sum(update) for _, update, _ in own)
        if sums and _is_narrow([cast(LoRAUpdate, u) for _, u, _ in own], most_rank):
            _add_sums(content, number, [(cast(LoRAUpdate, u), w) for _, u, w in own])
        else:
            # A sum beside an update that rescales the output would be rescaled too.
            for at, update, _ in own:
                others[at][number] = update
    pairs = zip(others, terms, strict=True)
    content.others = [(own, weight) for own, (_, weight) in pairs if own]
    return content


def has_rows(layer: AdaptedLayer) -> bool:
    """Whether a layer is linear, and each of its rows is one of the batch."""
    return is_linear(layer) and layer.adapter_experts is None


def _is_narrow(updates: Iterable[LoRAUpdate], most_rank: int | None) -> bool:
    """Whether the sum of some updates of a layer may be in the buffers."""
    ranks = (part.site.rank for update in updates for part in update.parts.values())
    return most_rank is None or sum(ranks) <= most_rank


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
        elif update.is_whole and not is_virtual(update):
            reason = "it has virtual tokens, and changes the input embedding beside them"
        if reason:
            raise RouteError(f"an adapter of {path or 'the model'} can't be in a slot: {reason}")


def is_virtual(update: Update) -> bool:
    """Whether an update is that of virtual tokens alone."""
    return isinstance(update, TokenVectors)


def _add_sums(content: SlotContent, number: int, own: Sequence[tuple[LoRAUpdate, float]]) -> None:
    parts = [(part, w) for update, w in own for part in update.parts.values() if w]
    biases = [(update, w) for update, w in own if update.has_shift and w]
    if parts:
        content.parts[number] = parts
    if biases:
        content.biases[number] = biases


class WideUpdate(LoRAUpdate):
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
