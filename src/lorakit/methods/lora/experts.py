"""LoRA on the weights of experts: W + scale·B·A for each of a parameter's matrices.

A module of experts uses its weights where they are; no call of a layer lies between, after which
B·A·x could be added. So it computes with the changed weights, as a copy of it would that has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Update
from lorakit.methods.lora.lora import LowRank, positions
from lorakit.methods.lora.parameter_update import ParameterUpdate
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.models.base import base_parameter
from lorakit.models.experts import ExpertMatrices, expert_matrices
from lorakit.upstream.private_names import own_modules, own_parameters


class ExpertsUpdate(ParameterUpdate):
    """All that one adapter does to one module of experts."""

    replaces_output = True

    def join(self, other: ExpertsUpdate) -> None:
        """Take over what another update of the same adapter does to the module."""
        own_modules(self).update(other.parts)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The module's output with W + scale·B·A in the place of each W."""
        return with_weights(layer, changed_weights(layer, [(self, 1.0)]), inputs)

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter plus ΔW."""
        with torch.no_grad():
            yield from changed_weights(layer, [(self, 1.0)], exact=exact).items()


def low_ranks_of(update: Update) -> list[LowRank]:
    """A and B of each site of an update; none where it is of another method."""
    if isinstance(update, LoRAUpdate | ParameterUpdate):
        return list(update.low_ranks())
    return []


def part_key(part: LowRank) -> str:
    """The name of a site's A and B within the update of its module."""
    role = part.site.role
    return part.site.parameter if role is None else role.replace(".", " ")


def changed_weights(
    layer: nn.Module,
    terms: Sequence[tuple[ExpertsUpdate, float]],
    *,
    exact: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The parameters of a module of experts plus the sum of weight·scale·B·A, by name.

    Args:
        layer: the module.
        terms: updates and their weights.
        exact: precision of the sum and the result; None: summed in float32 or better, and rounded
            to the parameter's own.
    """
    parts: dict[str, list[tuple[LowRank, float]]] = {}
    for update, weight in terms:
        for part in update.low_ranks():
            parts.setdefault(part.site.parameter, []).append((part, weight))
    matrices = {each.name: each for each in expert_matrices(layer)}
    return {name: _changed(layer, matrices[name], own, exact) for name, own in parts.items()}


def _changed(
    layer: nn.Module,
    matrices: ExpertMatrices,
    parts: Sequence[tuple[LowRank, float]],
    exact: torch.dtype | None,
) -> Tensor:
    weight = base_parameter(layer, matrices.name)
    dtype = exact or torch.promote_types(weight.dtype, torch.float32)
    a = torch.cat([part.a.to(dtype) for part, _ in parts], dim=1)
    b = torch.cat([_on_all_rows(part, weight, matrices.d_out, dtype) for part, weight in parts], 2)
    base = weight.to(dtype)
    if matrices.transposed:
        return torch.baddbmm(base, a.mT, b.mT).to(exact or weight.dtype)
    return torch.baddbmm(base, b, a).to(exact or weight.dtype)


def _on_all_rows(part: LowRank, weight: float, rows: int, dtype: torch.dtype) -> Tensor:
    """weight·scale·B with a row for each output, (experts, d_out, rank); zero beside the slice."""
    b = part.b.to(dtype) * (part.site.scale * weight)
    if part.site.rows is None:
        return b
    index = positions(part.site.rows, b.device)
    return b.new_zeros(b.shape[0], rows, b.shape[2]).index_copy(1, index, b)


def with_weights(layer: nn.Module, weights: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Any:
    """What a module computes of inputs, with other values of some of its parameters.

    The module is not changed: other threads may use it meanwhile.
    """
    kind = layer.own_class if isinstance(layer, AdaptedLayer) else type(layer)
    double = object.__new__(kind)
    vars(double).update(vars(layer))
    vars(double)["_parameters"] = {**own_parameters(layer), **weights}
    return kind.forward(double, *inputs)
