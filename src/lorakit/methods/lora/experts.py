"""LoRA on the weights of experts: W + scale·B·A for each of a parameter's matrices.

A module of experts uses its weights where they are, so it computes with the changed ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.layers.operation import Update
from lorakit.methods.lora.lora import LowRank, positions
from lorakit.methods.lora.parameter_update import ParameterUpdate
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.methods.lora.with_weights import WithWeightsUpdate
from lorakit.models.base import base_parameter
from lorakit.models.experts import ExpertMatrices, expert_matrices
from lorakit.upstream.private_names import own_modules


class ExpertsUpdate(WithWeightsUpdate):
    """All that one adapter does to one module of experts."""

    def join(self, other: ExpertsUpdate) -> None:
        """Take over what another update of the same adapter does to the module."""
        own_modules(self).update(other.parts)

    @staticmethod
    def weights(
        layer: nn.Module,
        terms: Sequence[tuple[ParameterUpdate, float]],
        *,
        exact: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The parameters of the experts that are changed (see `WithWeightsUpdate`)."""
        parts: dict[str, list[tuple[LowRank, float]]] = {}
        for update, weight in terms:
            for part in update.low_ranks():
                parts.setdefault(part.site.parameter, []).append((part, weight))
        matrices = {each.name: each for each in expert_matrices(layer)}
        return {name: _changed(layer, matrices[name], own, exact) for name, own in parts.items()}


def low_ranks_of(update: Update) -> list[LowRank]:
    """A and B of each site of an update; none where it is of another method."""
    if isinstance(update, LoRAUpdate | ParameterUpdate):
        return list(update.low_ranks())
    return []


def part_key(part: LowRank) -> str:
    """The name of a site's A and B within the update of its module."""
    role = part.site.role
    return part.site.parameter if role is None else role.replace(".", " ")


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
