"""What a method trains at one module of the base, beside low-rank updates, biases and copies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.layers.operation import Update

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """One trained thing: a bottleneck behind a layer, the virtual tokens of an embedding, …

    It follows from the method's settings and the model alone, so that files need not hold it.
    """

    path: str
    """The module whose output it changes."""
    what: str
    """What it is, for the match table."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each trained tensor, by the tensor's name in the adapter."""

    @abstractmethod
    def update(
        self, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor] | None
    ) -> Update:
        """The update of the module; the modules are not changed.

        Args:
            modules: of the base, by path.
            tensors: the adapter's, by name; they are copied. None: a fresh start.
        """
