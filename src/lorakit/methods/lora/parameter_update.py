"""LoRA on a module's own parameters, each with A and B of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from lorakit.layers.operation import Update
from lorakit.methods.lora.lora import LowRank
from lorakit.upstream.private_names import own_modules


class ParameterUpdate(Update):
    """One adapter's updates of a module's own parameters."""

    def __init__(self, parts: Mapping[str, LowRank]) -> None:
        """Take A and B of each parameter, or of each of its slices, by name."""
        super().__init__()
        own_modules(self).update(parts)

    @property
    def parts(self) -> Mapping[str, LowRank]:
        """A and B by name: the children of this module."""
        return cast(Mapping[str, LowRank], own_modules(self))

    def low_ranks(self) -> Iterator[LowRank]:
        """Yield A and B of each parameter or slice."""
        return iter(self.parts.values())

    def let_train(self) -> None:
        """Let the tensors that the settings train take gradients."""
        for part in self.low_ranks():
            part.let_train()

    @property
    def summary(self) -> str:
        """The rank and scale of each of its updates, for `print(model)`."""
        return ", ".join(
            f"{part.site.role or part.site.parameter} rank {part.site.rank}, "
            f"scale {part.site.scale:g}"
            for part in self.low_ranks()
        )

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield A and B of each site."""
        for part in self.low_ranks():
            for end, parameter in part.named_parameters():
                yield f"{part.site.name}.{end}", parameter
