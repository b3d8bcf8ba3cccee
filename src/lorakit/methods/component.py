"""A component: one thing that an adapter trains at one module of the base."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.layers.operation import Update

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Materials:
    """The modules and tensors from which updates are made; the modules are not changed."""

    modules: Mapping[str, nn.Module]
    """Every module of the base, by its path."""
    tensors: Mapping[str, Tensor] | None = None
    """The adapter's tensors, by name; None: a fresh start."""
    copy: bool = True
    """Leave the tensors alone; else low-rank updates may keep them."""
    of_sites: dict[str, nn.Module] = field(default_factory=dict)
    """What was made for each low-rank update, by the name of its site: tied ones have it too."""
    tied: dict[int, nn.Parameter] = field(default_factory=dict)
    """The parameter that was made for each parameter of the base that several modules share."""

    def tensor(self, name: str, device: torch.device, fresh: Callable[[], Tensor]) -> Tensor:
        """The adapter's tensor of a name on a device, or the one of a fresh start; a copy."""
        values = fresh() if self.tensors is None else self.tensors[name]
        return values.to(device, copy=True)


@dataclass(frozen=True, kw_only=True)
class Component(ABC):
    """One trained thing: a low-rank update, a bias, a copy, a bottleneck, virtual tokens, …"""

    path: str
    """The module that it changes."""
    method: str
    """The method that trains it."""

    step: ClassVar[int] = 3
    """When its update of a module comes, among those of other components: lower is earlier."""

    @property
    def reads_base(self) -> bool:
        """Whether a fresh start is made from the base's own values."""
        return False

    @property
    @abstractmethod
    def what(self) -> str:
        """The name of its kind, for the match table."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each of its tensors, by the tensor's name in an adapter."""

    @property
    def parameters(self) -> int:
        """The number of values that are trained."""
        return sum(map(math.prod, self.shapes.values()))

    @abstractmethod
    def update(self, materials: Materials) -> Update:
        """The update of the module."""

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of the match table: module, role, shape, rank, scale."""
        size = "+".join("×".join(map(str, shape)) for shape in self.shapes.values())
        return self.path, self.what, size, "", ""
