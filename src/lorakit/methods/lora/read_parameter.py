"""LoRA on a parameter that its module's own code reads: it reads W + scale·B·A."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.layers.operation import Update
from lorakit.methods.lora.lora import LowRank
from lorakit.models.base import base_parameter
from lorakit.upstream.private_names import own_modules


class ReadParameterUpdate(Update):
    """One adapter's updates of a module's own parameters; a call of the module is left as it is."""

    def __init__(self, parts: Mapping[str, LowRank]) -> None:
        """Take A and B of each parameter, by its name."""
        super().__init__()
        own_modules(self).update(parts)

    @property
    def parts(self) -> Mapping[str, LowRank]:
        """A and B of each parameter, by its name: the children of this module."""
        return cast(Mapping[str, LowRank], own_modules(self))

    def low_ranks(self) -> Iterator[LowRank]:
        """Yield A and B of each parameter."""
        return iter(self.parts.values())

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The output as it is: it was made with what `read` returns."""
        return output

    def added(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Any,
        *,
        weight: float,
        base: Any,
    ) -> Any:
        """The output as it is."""
        return output

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The parameter plus ΔW, in its own precision."""
        part = self.parts.get(name)
        exact = torch.promote_types(weight.dtype, torch.float32)
        return weight if part is None else part.added_to(weight.to(exact)).to(weight.dtype)

    def let_train(self) -> None:
        """Let the tensors that the settings train take gradients."""
        for part in self.low_ranks():
            part.let_train()

    @property
    def summary(self) -> str:
        """The rank and scale of each of its updates, for `print(model)`."""
        return ", ".join(
            f"{name} rank {part.site.rank}, scale {part.site.scale:g}"
            for name, part in self.parts.items()
        )

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter plus ΔW."""
        with torch.no_grad():
            for name, part in self.parts.items():
                yield name, part.added_to(base_parameter(layer, name).to(exact))

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield A and B of each site."""
        for part in self.low_ranks():
            for end, parameter in part.named_parameters():
                yield f"{part.site.name}.{end}", parameter
