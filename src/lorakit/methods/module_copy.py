"""A full copy of a module, trained in place of the base's: a classifier head, for example."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.adapted_layer import AdaptedLayer, adapted_layers, restore
from lorakit.layers.operation import Update
from lorakit.layers.route import Route
from lorakit.methods.component import Component, Materials, Shape
from lorakit.models.base import base_modules, base_parameters


class ModuleCopy(Update):
    """The adapter's own copy of one module, which computes in the module's place."""

    replaces_output = True

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        *,
        shared: MutableMapping[int, nn.Parameter] | None = None,
        again: frozenset[str] = frozenset(),
    ) -> None:
        """Copy a module.

        Args:
            module: of the base.
            dtype: precision of the copy.
            shared: copies of parameters by the id of the base's. One that is there is not copied
                again, so that tied weights stay tied; those that are made here are added.
            again: those of other copies that an adapter has under this module's name as well.
        """
        super().__init__()
        # Other adapters of the module, and its route, are not copied.
        left = [m for _, m in base_modules(module) if isinstance(m, AdaptedLayer)]
        memo: dict[int, Any] = {id(layer.adapter_bank): nn.ModuleDict() for layer in left}
        memo |= {id(layer.adapter_route): Route() for layer in left}
        # The copy shares the model's configuration.
        configs = (getattr(m, "config", None) for _, m in base_modules(module))
        memo |= {id(config): config for config in configs}
        memo |= shared or {}
        self.copy = copy.deepcopy(module, memo).to(dtype).eval().requires_grad_(False)
        for _, layer in list(adapted_layers(self.copy)):
            restore(layer)
        self.tied = frozenset(self._share(module, shared) if shared is not None else ())
        """Parameters that belong to another copy."""
        self.again = again & self.tied
        self.resized = False
        """Whether it has another number of classes than the base's."""

    def _share(self, module: nn.Module, shared: MutableMapping[int, nn.Parameter]) -> Iterator[str]:
        """Yield the names of parameters that another copy has made, and add one's own to those."""
        own = dict(self.copy.named_parameters())
        for name, parameter in base_parameters(module):
            if id(parameter) in shared:
                yield name
            else:
                shared[id(parameter)] = own[name]

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The copy's output, in the precision of the input, or for token ids of the layer."""
        own = next(self.copy.parameters()).dtype
        result = self.copy(*(x.to(own) if _is_floating(x) else x for x in inputs))
        first, base = inputs[0], next(base_parameters(layer))[1]
        dtype = first.dtype if _is_floating(first) else base.dtype
        return result.to(dtype) if isinstance(result, Tensor) else result

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The copy's own value, in the precision of the base's."""
        own = None if inside else dict(self.copy.named_parameters()).get(name)
        return weight if own is None else own.to(weight.dtype)

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of the copy."""
        for name, parameter in self.copy.named_parameters():
            yield name, parameter.detach().to(exact)

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter of the copy, but for those of other copies."""
        for name, parameter in self.copy.named_parameters():
            if name not in self.tied:
                yield f"{path}.{name}", parameter

    def shared_tensors(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of other copies that an adapter has under this name too."""
        for name, parameter in self.copy.named_parameters():
            if name in self.again:
                yield f"{path}.{name}", parameter

    def fill(self, tensors: Mapping[str, Tensor], path: str) -> None:
        """Set the copy's parameters from an adapter's tensors of the module at a path."""
        for name, parameter in self.copy.named_parameters():
            if name in self.tied:
                continue
            values = tensors[f"{path}.{name}"]
            self.resized |= values.shape != parameter.shape
            parameter.data = values.to(parameter.device, copy=True)
        for module in self.copy.modules():
            if isinstance(module, nn.Linear):
                module.out_features = module.weight.shape[0]


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@dataclass(frozen=True, kw_only=True)
class TrainedCopy(Component):
    """A module trained as a full copy, which computes in the module's place."""

    sizes: Mapping[str, Shape]
    """The shape of each parameter, by its name in the module."""
    dtype: str
    """Precision of the copy."""
    keeps_ties: bool = False
    """Whether a parameter that several copied modules share is one parameter in the copies too."""
    again: frozenset[str] = frozenset()
    """Parameters that an earlier copy has, and that files have under this copy's name as well."""

    step = 2
    what = "full copy"
    reads_base = True

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each parameter; the names are those of the base's parameters."""
        return {f"{self.path}.{name}": size for name, size in self.sizes.items()}

    def update(self, materials: Materials) -> ModuleCopy:
        """The copy, whose fresh values are the module's own."""
        dtype, shared = getattr(torch, self.dtype), materials.tied if self.keeps_ties else None
        made = ModuleCopy(materials.modules[self.path], dtype, shared=shared, again=self.again)
        if materials.tensors is not None:
            made.fill(materials.tensors, self.path)
        return made

    @property
    def parameters(self) -> int:
        """The number of values that are trained, without those of earlier copies."""
        return sum(math.prod(size) for name, size in self.sizes.items() if name not in self.again)

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of the match table, where copies of all sizes are one row."""
        return self.path, self.what, "", "", ""


def trained_copy(model: nn.Module, path: str, method: str, *, dtype: str) -> TrainedCopy:
    """The component that trains a module of the base as a full copy."""
    module = model.get_submodule(path)
    sizes = {name: tuple(parameter.shape) for name, parameter in base_parameters(module)}
    return TrainedCopy(path=path, method=method, sizes=sizes, dtype=dtype)
