"""A full copy of a module, trained in place of the base's: a classifier head, for example."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.methods.layer import AdaptedLayer, Route, Update, adapted_layers, release
from lorakit.models.base import base_modules, base_parameters


class ModuleCopy(Update):
    """The adapter's own copy of one module, which answers in its place."""

    replaces_output = True

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # Other adapters that sit on the module stay with the module, and so does the route.
        left = [m for _, m in base_modules(module) if isinstance(m, AdaptedLayer)]
        memo: dict[int, Any] = {id(layer.adapter_bank): nn.ModuleDict() for layer in left}
        memo |= {id(layer.adapter_route): Route() for layer in left}
        self.copy = copy.deepcopy(module, memo).to(dtype).eval().requires_grad_(False)
        for _, layer in list(adapted_layers(self.copy)):
            release(layer)
        self.resized = False
        """Whether it has another number of classes than the base's."""

    def change(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Any,
        *,
        strength: float = 1.0,
        base: Any = None,
    ) -> Any:
        """Return what the copy computes, in the input's precision, or for token ids the layer's.

        With a strength, or beside other adapters, the copy counts by its difference from the base's
        output.
        """
        own = self._run(layer, inputs)
        if strength == 1 and base is None:
            return own
        return output + strength * (own - (output if base is None else base))

    def _run(self, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        first = next(self.copy.parameters())
        floating = isinstance(inputs[0], Tensor) and inputs[0].is_floating_point()
        x = inputs[0].to(first.dtype) if floating else inputs[0]
        result = self.copy(x, *inputs[1:])
        dtype = inputs[0].dtype if floating else next(base_parameters(layer))[1].dtype
        return result.to(dtype) if isinstance(result, Tensor) else result

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of the copy."""
        for name, parameter in self.copy.named_parameters():
            yield name, parameter.detach().to(exact)

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter of the copy."""
        for name, parameter in self.copy.named_parameters():
            yield f"{path}.{name}", parameter

    def fill(self, tensors: Mapping[str, Tensor], path: str) -> None:
        """Set the copy's parameters from the tensors of the module that lies at a path."""
        for name, parameter in self.copy.named_parameters():
            values = tensors[f"{path}.{name}"]
            self.resized |= values.shape != parameter.shape
            parameter.data = values.to(parameter.device, copy=True)
        for module in self.copy.modules():
            if isinstance(module, nn.Linear):
                module.out_features = module.weight.shape[0]
