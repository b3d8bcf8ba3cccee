"""Mixed batches in one unchanging form, for torch.compile: a new route is only new tensors.

Every linear layer gets A and B for each row, zeros where a row has no update there, so that
neither the route nor the resident adapters change the compiled graph. Ranks are marked
as dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.batch_rows import check_rows_first
from lorakit.layers.operation import Operation, Update
from lorakit.layers.route import Combination
from lorakit.methods.lora.lora import (
    LowRank,
    is_linear,
    matrix_shape,
)
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.routing.choices import RowChoices, UpdatesByName
from lorakit.routing.row_groups import read_for_all
from lorakit.routing.row_updates import bias_shifts, write_sum
from lorakit.routing.stacked_lora import is_sum, mixed_operations
from lorakit.upstream.private_names import mark_dynamic

LEAST_RANK = 2
"""torch.compile makes another graph for a size of 0 or 1."""


def static_operations(
    layers: Mapping[int, AdaptedLayer],
    updates: UpdatesByName,
    choices: RowChoices,
    device: torch.device,
) -> dict[int, Operation]:
    """The operation of each layer, in a form that is the same for every batch of one length.

    Layers that are not linear, those within experts, full copies, and DoRA have the operations of
    any mixed batch, where another grouping of the rows is another graph.

    Args:
        layers: all adapted layers by number.
        updates: of every adapter that a row uses.
        choices: of the rows.
        device: where the rows are.
    """
    operations: dict[int, Operation] = {}
    others: dict[str, dict[int, Update]] = {name: {} for name in updates}
    for number, layer in layers.items():
        mine = {name: ups[number] for name, ups in updates.items() if number in ups}
        of_rows = layer.adapter_experts is None or len(choices.index_of_row) == 1
        if of_rows and is_linear(layer) and all(map(is_sum, mine.values())):
            operations[number] = StaticLoRA(layer, cast(Any, mine), choices, device)
        else:
            for name, update in mine.items():
                others[name][number] = update
    return operations | mixed_operations(layers, others, choices, device)


class StaticLoRA(Operation):
    """The updates of a linear layer, as one A and one B for each row."""

    def __init__(
        self,
        layer: AdaptedLayer,
        updates: Mapping[str, LoRAUpdate],
        choices: RowChoices,
        device: torch.device,
    ) -> None:
        d_out, d_in = matrix_shape(layer)
        weight = cast(Tensor, layer.weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        first = choices.combinations[0] if choices.index_of_row[0] >= 0 else ()
        self._read = [(updates[name], w) for name, w in first if name in updates]
        terms = [_terms(combination, updates) for combination in choices.combinations]
        rank = max([LEAST_RANK, *(sum(p.site.rank for p, _ in each) for each in terms)])
        a = torch.zeros(len(terms) + 1, rank, d_in, dtype=dtype, device=device)
        b = torch.zeros(len(terms) + 1, rank, d_out, dtype=dtype, device=device)
        for index, each in enumerate(terms, 1):
            write_sum(a[index], b[index], each)
        rows = torch.tensor(choices.index_of_row, device=device) + 1
        self._a, self._b = a[rows], b[rows]
        has_shift = layer.bias is not None or any(each.has_shift for each in updates.values())
        self._shift = _shifts(layer, updates, choices, dtype)[rows] if has_shift else None
        for tensor in (self._a, self._b):
            mark_dynamic(tensor, 1)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with each row's own update added."""
        rows = self._a.shape[0]
        if rows > 1 and not torch.compiler.is_compiling():
            check_rows_first(cast(AdaptedLayer, layer), inputs[0], rows)
        x = inputs[0].reshape(rows, -1, inputs[0].shape[-1]).to(self._a.dtype)
        update = torch.bmm(torch.bmm(x, self._a.mT), self._b)
        if self._shift is not None:
            update = update + self._shift[:, None]
        return (output + update.reshape(output.shape)).to(output.dtype)

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """A parameter with the updates of the one combination that all rows use."""
        return read_for_all(self._read, self._a.shape[0], name, weight, inside=inside)


def _terms(
    combination: Combination, updates: Mapping[str, LoRAUpdate]
) -> list[tuple[LowRank, float]]:
    return [
        (part, weight)
        for name, weight in combination
        if name in updates
        for part in updates[name].parts.values()
    ]


@torch.no_grad()
def _shifts(
    layer: nn.Module,
    updates: Mapping[str, LoRAUpdate],
    choices: RowChoices,
    dtype: torch.dtype,
) -> Tensor:
    """What is added to the layer's bias, for the base and each combination."""
    terms = [
        [(updates[name], weight) for name, weight in combination if name in updates]
        for combination in choices.combinations
    ]
    return bias_shifts(layer, terms, dtype)
