"""Rows with adapters of their own in experts that get tokens: one combination after the other.

An expert is given the tokens that chose it, which do not say whose they are. The module of all
experts is given every token in order, with its experts: so it is what is called once for the tokens
of each combination, and within that call every token has the same adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Operation, Operations
from lorakit.routing.choices import RowChoices, UpdatesByName
from lorakit.routing.row_groups import input_rows

OfOne = Callable[[RowChoices], Mapping[int, Operation]]
"""The operations of layers within experts for rows that all use one combination."""


def parted(
    layers: Mapping[int, AdaptedLayer], updates: UpdatesByName
) -> tuple[UpdatesByName, UpdatesByName]:
    """The updates of layers that are given rows, and those of layers within experts."""
    rows, tokens = (
        {
            name: {n: u for n, u in own.items() if (layers[n].adapter_experts is None) is given}
            for name, own in updates.items()
        }
        for given in (True, False)
    )
    return rows, tokens


def operations_of_experts(
    layers: Mapping[int, AdaptedLayer],
    updates: UpdatesByName,
    choices: RowChoices,
    device: torch.device,
    of_one: OfOne,
) -> dict[int, Operation]:
    """The operations of modules of experts, and of the layers within, for rows that differ.

    Args:
        layers: the adapted layers by number.
        updates: those within experts, of every adapter that a row uses.
        choices: of the rows.
        device: where the rows are.
        of_one: makes the operations for a batch of one combination.
    """
    numbers = sorted({number for own in updates.values() for number in own})
    groups = []
    for index in sorted(set(choices.index_of_row)) if numbers else ():
        rows = [row for row, used in enumerate(choices.index_of_row) if used == index]
        operations = None
        if index >= 0:
            own = choices.combinations[index]
            one = RowChoices(
                combinations=(own,),
                index_of_row=(0,),
                rows=None,
                names=tuple(name for name, _ in own),
            )
            operations = of_one(one)
        groups.append(_Group(torch.tensor(rows, device=device), operations))
    outer = {cast(int, layers[number].adapter_experts) for number in numbers}
    return {
        **{number: _ByCombination(groups, len(choices.index_of_row)) for number in outer},
        **dict.fromkeys(numbers, _OfNobody()),
    }


@dataclass(frozen=True)
class _Group:
    """The rows that use one combination."""

    index: Tensor
    """Row numbers, int64."""
    operations: Operations | None
    """Those of layers within experts; None: the base answers."""


class _ByCombination(Operation):
    """A module of experts, called once for the tokens of each combination."""

    replaces_output = True

    def __init__(self, groups: list[_Group], rows: int) -> None:
        self._groups, self._rows = groups, rows

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        """What the experts make of each token, by the adapters of its row.

        Raises:
            RouteError: an input has not as many tokens as the others, or a part of a row.
        """
        experts = cast(AdaptedLayer, layer)
        tokens = inputs[0].shape[0]
        sizes = {x.shape[0] for x in inputs if isinstance(x, Tensor)}
        if len(sizes) > 1 or tokens % self._rows:
            raise RouteError(
                f"the route is for {self._rows} rows, but {experts.adapter_path} was given inputs "
                f"of {', '.join(map(str, sorted(sizes)))} tokens; route the whole batch to one "
                "adapter, or leave the experts out"
            )
        places = [input_rows(group.index, tokens, self._rows) for group in self._groups]
        route, found = experts.adapter_route, []
        for group, own in zip(self._groups, places, strict=True):
            mine = tuple(x[own] if isinstance(x, Tensor) else x for x in inputs)
            frame = replace(route.top, operations=group.operations, rows=None, under=None)
            with route.own.pushed(frame):
                found.append(experts.own_class.forward(experts, *mine))
        return torch.cat(found)[torch.cat(places).argsort()]


class _OfNobody(Operation):
    """A layer within an expert, called past the module of all experts, or in compiled code."""

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Nothing.

        Raises:
            RouteError: always.
        """
        path = cast(AdaptedLayer, layer).adapter_path
        raise RouteError(
            f"the rows cannot differ: {path} is given the tokens that chose its expert, which do "
            "not say whose they are where an expert is called by itself or compiled; route the "
            "whole batch to one adapter, or leave the experts out"
        )
