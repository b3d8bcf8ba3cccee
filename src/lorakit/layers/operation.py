"""Operations: changes of the output of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.virtual_tokens import VirtualTokens


class Operation(ABC):
    """A change of one layer's output: by one adapter, or by several to rows of their own."""

    replaces_output = False
    """Whether the base's own output is not needed."""
    is_whole = False
    """Whether it can be neither weighted nor added to other operations of a row."""
    virtual_tokens: VirtualTokens | None = None
    """The virtual tokens that rows get, for an operation of the input embedding."""

    @abstractmethod
    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The adapted output for a layer's inputs and its own output.

        May write into `output`, which is the layer's own, fresh result.
        """

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The value that is read in place of one of the layer's parameters.

        Args:
            name: of the parameter.
            weight: the base's own.
            inside: whether the layer's own call reads it, whose output `adapt` changes.
        """
        return weight

    def tokens_of_rows(self, rows: int) -> list[VirtualTokens | None]:
        """The virtual tokens of each row of a batch of that many rows."""
        return [self.virtual_tokens] * rows


Operations = Mapping[int, Operation]
"""The operation of each adapted layer, by the layer's number; a layer without one is the base's."""


class Update(nn.Module, Operation):
    """The operation of one adapter on one layer; made frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["training"] = False

    def added(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Any,
        *,
        weight: float,
        base: Any,
    ) -> Any:
        """An output to which weight times this update alone is added.

        Args:
            layer: the adapted layer.
            inputs: its positional arguments.
            output: the layer's own, with the updates of other adapters. It may be written into.
            weight: factor on the update.
            base: the layer's own output, which stays as it is.
        """
        return output + weight * (self.adapt(layer, inputs, base.clone()) - base)

    def let_train(self) -> None:
        """Let its weights take gradients, except those that its method keeps frozen."""
        self.requires_grad_()

    @property
    def summary(self) -> str:
        """The names and shapes of its parameters, for `print(model)`."""
        return ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters())

    def why_unmergeable(self, layer: nn.Module) -> str | None:
        """Why no weights of the layer can hold this update; None where they can."""
        return None

    @abstractmethod
    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the merged value, in precision `exact`, of each changed parameter."""

    @abstractmethod
    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield its tensors under their names in an `Adapter`.

        Args:
            path: of the layer.
        """

    def shared_tensors(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Yield those tensors of an `Adapter` which the parameters of another update hold.

        Args:
            path: of the layer.
        """
        return iter(())


class ReadUpdate(Update):
    """An update of what a layer's own code reads, by `read`: a call of the layer stays as it is."""

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
