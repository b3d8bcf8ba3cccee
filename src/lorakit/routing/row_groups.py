"""Mixed batches of layers whose updates can't be stacked: one group of rows after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.batch_rows import check_rows_first
from lorakit.layers.operation import Operation, Update
from lorakit.methods.lora.with_weights import WithWeightsUpdate, with_sum
from lorakit.methods.module_copy import ModuleCopy
from lorakit.routing.choices import RowChoices, Terms


@dataclass(frozen=True)
class RowGroup:
    """The rows that use one combination."""

    index: Tensor
    """Row numbers, int64."""
    terms: tuple[tuple[Update, float], ...]


class ByRowGroup(Operation):
    """Any updates of any layer, one group after the other: convolutions, embeddings, full copies.

    Copies of a head may differ in width: then the output is as wide as the widest, and the classes
    that a row's own head does not have are minus infinity, so that none of them is likely.
    """

    def __init__(
        self, layer: AdaptedLayer, terms: Terms, choices: RowChoices, device: torch.device
    ) -> None:
        self._rows = len(choices.index_of_row)
        self._groups = []
        for index, own in terms.items():
            _check_addable(layer, own)
            rows = [row for row, used in enumerate(choices.index_of_row) if used == index]
            self._groups.append(RowGroup(torch.tensor(rows, device=device), tuple(own)))

    def tokens_of_rows(self, rows: int) -> list[VirtualTokens | None]:
        """The virtual tokens of each row of a batch of that many rows."""
        tokens: list[VirtualTokens | None] = [None] * rows
        for group in self._groups:
            own = next((u.virtual_tokens for u, _ in group.terms if u.virtual_tokens), None)
            for row in input_rows(group.index, rows, self._rows).tolist():
                tokens[row] = own
        return tokens

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with each row's own update."""
        if self._rows == 1:
            return applied(self._groups[0].terms, layer, inputs, output)
        if inputs[0].dim() > 1 and len(inputs[0]) == 1 and not inputs[0].is_floating_point():
            # All rows share one input, such as positions; their outputs differ all the same.
            inputs = (inputs[0].expand(self._rows, *inputs[0].shape[1:]), *inputs[1:])
            output = output.expand(self._rows, *output.shape[1:])
        else:
            check_rows_first(cast(AdaptedLayer, layer), inputs[0], self._rows)
        results: list[tuple[Tensor, Tensor]] = []
        for group in self._groups:
            index = input_rows(group.index, inputs[0].shape[0], self._rows)
            with cast(AdaptedLayer, layer).adapter_route.for_rows(index):
                results.append((index, self._adapted(group, layer, inputs, output, index)))
        widest = max(output.shape[-1], *(adapted.shape[-1] for _, adapted in results))
        output = widened(output, widest)
        for index, adapted in results:
            output = output.index_copy(0, index, widened(adapted, widest).to(output.dtype))
        return output

    @staticmethod
    def _adapted(
        group: RowGroup, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor, index: Tensor
    ) -> Tensor:
        found = inputs[0].shape[0]
        mine = tuple(
            x[index] if isinstance(x, Tensor) and x.dim() and x.shape[0] == found else x
            for x in inputs
        )
        return applied(group.terms, layer, mine, output[index])

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """A parameter with the updates of the one combination that all rows use."""
        return read_for_all(self._groups[0].terms, self._rows, name, weight, inside=inside)


def read_for_all(
    terms: Sequence[tuple[Update, float]], rows: int, name: str, weight: Tensor, *, inside: bool
) -> Tensor:
    """A parameter with the updates of the combination that all rows use.

    Where rows may differ, the layer's own call reads the base's: its output is changed after it.

    Raises:
        RouteError: others read the parameter, once for several rows, which may differ.
    """
    if rows > 1 and inside:
        return weight
    if rows > 1:
        raise RouteError(
            "the rows cannot differ: an adapted layer has a weight that the model reads by itself, "
            "once for all rows; route the whole batch to one adapter, or leave the layer out"
        )
    adapted = weight
    for update, factor in terms:
        own = update.read(name, weight, inside=inside)
        adapted = adapted if own is weight else adapted + factor * (own - weight)
    return adapted


def applied(
    terms: Sequence[tuple[Update, float]], layer: nn.Module, inputs: tuple[Any, ...], base: Any
) -> Any:
    """A layer's output with the updates of one combination.

    Args:
        terms: the updates and their weights.
        layer: the layer.
        inputs: its positional arguments.
        base: its own output, for updates that are added to it.
    """
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0].adapt(layer, inputs, base)
    if all(isinstance(update, WithWeightsUpdate) for update, _ in terms):
        return with_sum(layer, cast(Sequence[tuple[WithWeightsUpdate, float]], terms), inputs)
    adapted = base.clone()
    for update, weight in terms:
        adapted = update.added(layer, inputs, adapted, weight=weight, base=base)
    return adapted


def _check_addable(layer: AdaptedLayer, terms: Sequence[tuple[Update, float]]) -> None:
    """Refuse to add up what cannot be: virtual tokens, heads of other widths than the base's.

    Raises:
        RouteError: there are such.
    """
    plain = len(terms) == 1 and terms[0][1] == 1
    if not plain and any(u.is_whole for u, _ in terms):
        raise RouteError(
            "a row can't mix or weaken adapters with virtual tokens: use such an adapter at "
            "weight 1, beside none that has tokens of its own or changes the input embedding"
        )
    if not plain and any(isinstance(u, ModuleCopy) and u.resized for u, _ in terms):
        raise RouteError(
            f"a row can't mix or weaken adapters whose head ({type(layer).__name__}) has another "
            "number of classes than the base's: use such an adapter alone, at weight 1"
        )


def widened(output: Tensor, width: int) -> Tensor:
    """An output of at least so many entries; those added are minus infinity."""
    missing = width - output.shape[-1]
    return F.pad(output, (0, missing), value=float("-inf")) if missing else output


def input_rows(index: Tensor, found: int, rows: int) -> Tensor:
    """The rows of an input that belong to rows of the batch; it may have several for each."""
    each = found // rows
    if each == 1:
        return index
    return (index[:, None] * each + torch.arange(each, device=index.device)).flatten()
