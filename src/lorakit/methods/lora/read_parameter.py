"""LoRA on a parameter that its module's own code reads: it reads W + scale·B·A."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lorakit.layers.operation import ReadUpdate
from lorakit.methods.lora.parameter_update import ParameterUpdate
from lorakit.models.base import base_parameter


class ReadParameterUpdate(ParameterUpdate, ReadUpdate):
    """One adapter's updates of a module's own parameters, which are read by name."""

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The parameter plus ΔW, in its own precision."""
        part = self.parts.get(name)
        exact = torch.promote_types(weight.dtype, torch.float32)
        return weight if part is None else part.added_to(weight.to(exact)).to(weight.dtype)

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter plus ΔW."""
        with torch.no_grad():
            for name, part in self.parts.items():
                yield name, part.added_to(base_parameter(layer, name).to(exact))
