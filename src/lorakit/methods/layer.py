"""One adapted layer: a layer of the base, a bank of updates, and a route that picks among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import RouteError


def bank_key(name: str) -> str:
    """Return the child name for an adapter: torch allows no dots, and its own methods' names."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")


@dataclass(frozen=True)
class RowGroup:
    """The rows of a batch that use one adapter."""

    key: str
    """The adapter's `bank_key`."""
    index: Tensor
    """Row numbers, int64."""


@dataclass
class Route:
    """Which adapter each row uses. One object is shared by all adapted layers of a model."""

    active: str | None = None
    """The key of the adapter of every row; None: the base."""
    groups: tuple[RowGroup, ...] | None = None
    """The rows of each adapter, where they differ; this goes before `active`."""
    batch_size: int = 0
    """Rows that `groups` was made for."""
    merged: str | None = None
    """The key of the adapter that the base's weights hold at present."""


class Update(nn.Module, ABC):
    """What one adapter does to one layer."""

    replaces_output = False
    """Whether the base's own output is not needed."""

    @abstractmethod
    def change(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Return the adapted output for a layer's inputs and its own output.

        May write into `output`, which is the layer's own, fresh result.
        """

    @abstractmethod
    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the merged value, in precision `exact`, of each changed parameter."""


class AdaptedLayer(nn.Module):
    """Mixed into a layer's own class by `adopt`; see docs/design.md for the reasons."""

    base_class: type[nn.Module]
    adapter_bank: nn.ModuleDict
    adapter_route: Route

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's output, changed by the adapters that the route names."""
        route = self.adapter_route
        if route.groups is not None:
            return self._forward_groups(route, args, kwargs)
        if route.active is None or route.active == route.merged:
            return super().forward(*args, **kwargs)
        if route.active not in self.adapter_bank:
            return super().forward(*args, **kwargs)
        update = cast(Update, self.adapter_bank[route.active])
        output = None if update.replaces_output else super().forward(*args, **kwargs)
        return update.change(self, args, output)

    def _forward_groups(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().forward(*args, **kwargs)
        for group in route.groups or ():
            if group.key in self.adapter_bank:
                index = _rows_of(group.index, args[0].shape[0], route.batch_size)
                update = cast(Update, self.adapter_bank[group.key])
                changed = update.change(self, (args[0][index], *args[1:]), output[index])
                output = output.index_copy(0, index, changed.to(output.dtype))
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists only in this process; a copy or a pickle makes it anew.
        return _blank, (self.base_class,), self.__dict__


def _rows_of(index: Tensor, found: int, expected: int) -> Tensor:
    """Return the positions of batch rows in a layer's input, which may flatten (batch, length)."""
    if found == expected:
        return index
    if found % expected:
        raise RouteError(f"the route is for {expected} rows, but the batch has {found} rows")
    each = found // expected
    return (index[:, None] * each + torch.arange(each, device=index.device)).flatten()


_ADAPTED: dict[type[nn.Module], type[AdaptedLayer]] = {}


def adapted_class(base: type[nn.Module]) -> type[AdaptedLayer]:
    """Return the subclass of a layer's class that looks for updates; there is one per class."""
    if base not in _ADAPTED:
        members = {"base_class": base}
        _ADAPTED[base] = type(f"Adapted{base.__name__}", (AdaptedLayer, base), members)
    return _ADAPTED[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    made = adapted_class(base)
    return made.__new__(made)


def adopt(layer: nn.Module, route: Route) -> AdaptedLayer:
    """Turn a layer into an adapted layer, in place; one that is adapted already stays as it is."""
    if not isinstance(layer, AdaptedLayer):
        layer.__class__ = adapted_class(type(layer))
        layer.adapter_bank = nn.ModuleDict()
        layer.adapter_route = route  # type: ignore[assignment]
    return cast(AdaptedLayer, layer)


def release(layer: nn.Module) -> None:
    """Turn an adapted layer into what it was before `adopt`."""
    assert isinstance(layer, AdaptedLayer)
    del layer.adapter_bank
    del layer.adapter_route
    layer.__class__ = layer.base_class  # type: ignore[assignment]


def update_of(layer: AdaptedLayer, name: str) -> Update | None:
    """Return what the adapter of this name does to a layer, or None if it leaves it alone."""
    key = bank_key(name)
    return cast(Update, layer.adapter_bank[key]) if key in layer.adapter_bank else None


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield the path and the object of each adapted layer."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module


@contextmanager
def routed(route: Route, **changes: Any) -> Iterator[None]:
    """Change a route for the time of a block; it is restored also after an error."""
    before = dict(vars(route))
    try:
        vars(route).update(changes)
        yield
    finally:
        vars(route).update(before)
