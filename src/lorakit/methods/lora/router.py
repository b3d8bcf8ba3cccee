"""LoRA on a router of its own kind: its scores, and so its experts, are those of W + scale·B·A."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.methods.lora.parameter_update import ParameterUpdate
from lorakit.methods.lora.with_weights import WithWeightsUpdate
from lorakit.models.base import base_parameter


class RouterUpdate(WithWeightsUpdate):
    """What one adapter does to one router."""

    @staticmethod
    def weights(
        layer: nn.Module,
        terms: Sequence[tuple[ParameterUpdate, float]],
        *,
        exact: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The router's weight plus the sum of weight·scale·B·A (see `WithWeightsUpdate`)."""
        base = base_parameter(layer, "weight")
        changed = base.to(exact or torch.promote_types(base.dtype, torch.float32))
        for update, factor in terms:
            for part in update.low_ranks():
                a, b = part.a.to(changed.dtype), part.b.to(changed.dtype)
                changed = torch.addmm(changed, b, a, alpha=part.site.scale * factor)
        return {"weight": changed.to(exact or base.dtype)}
