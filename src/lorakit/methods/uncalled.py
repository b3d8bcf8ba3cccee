"""Trained weights that the model reads by itself, and not by calling the layer that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorakit.layers.operation import ReadUpdate
from lorakit.methods.component import Component, Materials, Shape
from lorakit.models.base import base_parameter
from lorakit.upstream.private_names import own_parameters


class UncalledWeights(ReadUpdate):
    """The adapter's own values of such weights; a call of the layer is left as it is."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The adapter's own value, in the precision of the base's."""
        own = own_parameters(self).get(name)
        return weight if own is None else own.to(weight.dtype)

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield each value."""
        for name, parameter in self.named_parameters():
            yield name, parameter.detach().to(exact)

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each value under the name of the base's parameter."""
        for name, parameter in self.named_parameters():
            yield f"{path}.{name}", parameter


@dataclass(frozen=True, kw_only=True)
class UncalledComponent(Component):
    """Trained weights of one module that the model uses without calling the module."""

    sizes: Mapping[str, Shape]
    """The shape of each, by its name in the module."""
    dtype: str
    """Precision of the trained values."""

    reads_base = True

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each tensor, which has the name of the base's parameter."""
        return {f"{self.path}.{name}": shape for name, shape in self.sizes.items()}

    @property
    def what(self) -> str:
        """The names of the weights in their module."""
        return ", ".join(self.sizes)

    def update(self, materials: Materials) -> UncalledWeights:
        """The update of the module; it starts as the base's own values."""
        module, dtype = materials.modules[self.path], getattr(torch, self.dtype)
        values = {}
        for name in self.sizes:
            base = base_parameter(module, name).detach()
            full = f"{self.path}.{name}"
            values[name] = materials.tensor(full, base.device, partial(base.to, dtype))
        return UncalledWeights(values)


def uncalled_component(
    module: nn.Module, path: str, names: tuple[str, ...], *, method: str, dtype: str
) -> UncalledComponent:
    """The component that trains weights of a module which are used without calling it."""
    sizes = {name: tuple(base_parameter(module, name).shape) for name in names}
    return UncalledComponent(path=path, method=method, sizes=sizes, dtype=dtype)
