"""Rows with adapters of their own in a router, which tells the experts of every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.batch_rows import check_rows_first
from lorakit.methods.lora.with_weights import WithWeightsUpdate, with_weights
from lorakit.routing.choices import RowChoices, Terms
from lorakit.routing.row_groups import ByRowGroup, applied, input_rows


class RouterRows(ByRowGroup):
    """A router of its own kind, called once for the tokens of each combination.

    It is given tokens in their order, with a dimension of rows or without, and returns one entry or
    several entries for each: scores, weights, numbers of experts.
    """

    replaces_output = True

    def __init__(
        self, layer: AdaptedLayer, terms: Terms, choices: RowChoices, device: torch.device
    ) -> None:
        super().__init__(layer, terms, choices, device)
        for own in terms.values():
            plain = len(own) == 1 and own[0][1] == 1
            if not plain and not all(isinstance(update, WithWeightsUpdate) for update, _ in own):
                raise RouteError(
                    f"a row can't mix or weaken full copies of a router ({layer.adapter_path}): "
                    "use such an adapter alone, at weight 1"
                )
        rows = [row for row, used in enumerate(choices.index_of_row) if used not in terms]
        self._of_base = torch.tensor(rows, dtype=torch.int64, device=device)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """What the router makes of each token, by the adapters of its row.

        Raises:
            RouteError: it was given something else than the tokens of the batch, or returns
                something else than an entry for each.
        """
        if self._rows == 1:
            return applied(self._groups[0].terms, layer, inputs, output)
        router = cast(AdaptedLayer, layer)
        check_rows_first(router, inputs[0], self._rows)
        first = inputs[0].shape[0]
        groups = [(group.index, group.terms) for group in self._groups]
        found, rows = [], []
        for index, terms in [*groups, *([(self._of_base, ())] if len(self._of_base) else [])]:
            own = input_rows(index, first, self._rows)
            mine = tuple(
                x[own] if isinstance(x, Tensor) and x.dim() and x.shape[0] == first else x
                for x in inputs
            )
            made = applied(terms, layer, mine, None) if terms else with_weights(layer, {}, mine)
            found.append(_entries(router, made, mine[0].shape[:-1].numel()))
            rows.append(index)
        tokens = sum(each[0].shape[0] for each in found)
        order = torch.cat([input_rows(index, tokens, self._rows) for index in rows]).argsort()
        joined = tuple(torch.cat(parts)[order] for parts in zip(*found, strict=True))
        return joined if isinstance(made, tuple) else joined[0]


def _entries(router: AdaptedLayer, made: Any, tokens: int) -> Sequence[Tensor]:
    """The tensors of an output, each with one entry for each token.

    Raises:
        RouteError: one has another number, or is no tensor.
    """
    parts = made if isinstance(made, tuple) else (made,)
    if not all(isinstance(x, Tensor) and x.dim() and x.shape[0] == tokens for x in parts):
        raise RouteError(
            f"the rows cannot differ: {router.adapter_path} does not return one entry for each "
            "token; route the whole batch to one adapter, or leave the router out"
        )
    return parts
