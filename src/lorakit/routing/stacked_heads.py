"""Rows with heads of their own: full copies of one module, those of equal shapes in one call."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.kernels.grouped import gather
from lorakit.kernels.grouping import group_rows
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.batch_rows import check_rows_first
from lorakit.methods.module_copy import ModuleCopy
from lorakit.models.base import base_parameters
from lorakit.routing.choices import RowChoices, Terms
from lorakit.routing.row_groups import ByRowGroup, widened

LARGEST = 2**22
"""Parameters of a copy that is stacked. A larger one keeps the machine busy by itself, and the
stack holds everything once more."""

Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]
Uses = dict[int, tuple[ModuleCopy, float]]
"""By row: the copy that answers it, and its weight."""


def are_heads(terms: Terms) -> bool:
    """Whether several combinations each have small copies of a layer, and nothing else."""
    updates = [update for own in terms.values() for update, _ in own]
    return len(terms) > 1 and all(isinstance(u, ModuleCopy) and _is_small(u) for u in updates)


def _is_small(update: ModuleCopy) -> bool:
    # A module with buffers, such as a batch norm, may write to them.
    parameters = sum(p.numel() for p in update.copy.parameters())
    return 0 < parameters <= LARGEST and not any(True for _ in update.copy.buffers())


class StackedHeads(ByRowGroup):
    """Full copies of a layer: as many calls as there are different shapes, however many copies.

    What torch can't batch (a forward pass that looks at values, token ids, inputs that all rows
    share) is done one group after the other.
    """

    def __init__(
        self, layer: AdaptedLayer, terms: Terms, choices: RowChoices, device: torch.device
    ) -> None:
        super().__init__(layer, terms, choices, device)
        whole, weighted = _by_shape(terms, choices)
        dtype = torch.promote_types(next(base_parameters(layer))[1].dtype, torch.float32)
        make = functools.partial(Stack, batch_rows=self._rows, device=device, dtype=dtype)
        self._whole, self._weighted = list(map(make, whole)), list(map(make, weighted))
        self._refused = False

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with each row's own head."""
        x = inputs[0]
        fits = x.is_floating_point() and self._rows > 1
        if fits:
            check_rows_first(cast(AdaptedLayer, layer), x, self._rows)
        if fits and len(inputs) == 1 and not self._refused:
            try:
                return self._stacked(x, output)
            except RuntimeError:
                # Whatever else was wrong, the loop will say it again.
                self._refused = True
        return super().adapt(layer, inputs, output)

    def _stacked(self, x: Tensor, output: Tensor) -> Tensor:
        x = x.unflatten(0, (self._rows, -1))
        base = changed = output.unflatten(0, (self._rows, -1))
        for stack in self._weighted:
            changed = stack.added(changed, base, x)
        answers = [stack.answers(x) for stack in self._whole]
        widest = max(each.shape[-1] for each in (changed, *answers))
        changed = widened(changed, widest)
        for stack, own in zip(self._whole, answers, strict=True):
            changed = changed.index_copy(0, stack.rows, widened(own, widest).to(changed.dtype))
        return changed.flatten(0, 1)


def _by_shape(terms: Terms, choices: RowChoices) -> tuple[list[Uses], list[Uses]]:
    """The uses of copies of equal shapes: as a row's only answer, and weighted.

    No row is in one use twice: the terms of a combination are apart by their place in it.
    """
    whole: dict[Shapes, Uses] = {}
    weighted: dict[tuple[int, Shapes], Uses] = {}
    for row, index in enumerate(choices.index_of_row):
        used = terms.get(index, [])
        for place, (update, weight) in enumerate(used):
            own = cast(ModuleCopy, update)
            if len(used) == 1 and weight == 1:
                whole.setdefault(_shapes(own), {})[row] = own, weight
            else:
                weighted.setdefault((place, _shapes(own)), {})[row] = own, weight
    return list(whole.values()), list(weighted.values())


def _shapes(update: ModuleCopy) -> Shapes:
    return tuple((name, p.shape, p.dtype) for name, p in update.copy.named_parameters())


class Stack:
    """Copies of one module with equal shapes, stacked, and the rows that they answer."""

    def __init__(
        self, uses: Uses, *, batch_rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._copies = list(dict.fromkeys(own for own, _ in uses.values()))
        place = {own: at for at, own in enumerate(self._copies)}
        copy_of_row = [place[uses[row][0]] if row in uses else -1 for row in range(batch_rows)]
        self._grouping = group_rows(copy_of_row, device=device, kernels="plain")
        self.rows = torch.tensor(sorted(uses), device=device)
        """The rows that the copies answer, ascending."""
        weights = [uses[row][1] for row in sorted(uses)]
        self._weights = torch.tensor(weights, dtype=dtype, device=device)
        # Of its own, because a call puts the stacked parameters into the module for its time.
        self._module = copy.deepcopy(self._copies[0].copy).to("meta")
        trains = any(p.requires_grad for own in self._copies for p in own.parameters())
        self._frozen = None if trains else self._gathered()

    def _gathered(self) -> dict[str, Tensor]:
        """The parameters, each (groups, …)."""
        named = [dict(own.copy.named_parameters()) for own in self._copies]
        return {
            name: gather(torch.stack([each[name] for each in named]), self._grouping)
            for name in named[0]
        }

    def answers(self, x: Tensor) -> Tensor:
        """The outputs of the copies for their rows, (adapted, k, …), in the input's precision.

        Args:
            x: of all rows, (rows, k, …).
        """
        grouping, parameters = self._grouping, self._frozen or self._gathered()
        ordered = x if grouping.order is None else x.index_select(0, grouping.order)
        ordered = ordered.reshape(grouping.groups, -1, *x.shape[2:])
        ordered = ordered.to(next(iter(parameters.values())).dtype)
        self._module.train(self._copies[0].training)
        own = torch.vmap(self._call, randomness="different")(parameters, ordered)
        own = own.reshape(-1, x.shape[1], *own.shape[2:]).to(x.dtype)
        return own if grouping.back is None else own.index_select(0, grouping.back)

    def _call(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(self._module, parameters, (x,)))

    def added(self, output: Tensor, base: Tensor, x: Tensor) -> Tensor:
        """The output with weight·(answer - base) added to each row's own.

        Args:
            output: of all rows, (rows, k, …, classes).
            base: the base's, alike.
            x: the input, (rows, k, …).
        """
        shift = self.answers(x) - base.index_select(0, self.rows)
        weights = self._weights.reshape(-1, *[1] * (shift.dim() - 1))
        return output.index_add(0, self.rows, (weights * shift).to(output.dtype))
