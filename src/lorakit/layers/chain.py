"""Several updates of one adapter on one layer, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.layers.layer import Update


class Chain(Update):
    """Updates of which each changes what the one before has made: LoRA, then a bottleneck."""

    def __init__(self, links: Sequence[Update]) -> None:
        super().__init__()
        self.links = nn.ModuleList(links)
        self.replaces_output = self._each()[0].replaces_output
        self.is_whole = any(link.is_whole for link in links)
        tokens = (link.virtual_tokens for link in links if link.virtual_tokens)
        self.virtual_tokens = next(tokens, None)

    def adapt(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Any,
        *,
        weight: float = 1.0,
        base: Any = None,
    ) -> Any:
        """Return what the last update makes; with a strength, the whole of their change counts."""
        if weight == 1 and base is None:
            for link in self._each():
                output = link.adapt(layer, inputs, output)
            return output
        start = output if base is None else base
        changed = start.clone()
        for link in self._each():
            changed = link.adapt(layer, inputs, changed)
        return output + weight * (changed - start)

    def read(self, name: str, weight: Tensor) -> Tensor:
        """Return what is read in place of a parameter, after each update."""
        for link in self._each():
            weight = link.read(name, weight)
        return weight

    def let_train(self) -> None:
        """Let the weights of each update take gradients."""
        for link in self._each():
            link.let_train()

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged parameters of each update."""
        for link in self._each():
            yield from link.merged(layer, exact=exact)

    @property
    def unmergeable(self) -> str | None:
        """Return why one of them is no change of the weights, or None."""
        return next((why for link in self._each() if (why := link.unmergeable)), None)

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensors of each update."""
        for link in self._each():
            yield from link.named_tensors(path)

    def _each(self) -> list[Update]:
        return [cast(Update, link) for link in self.links]
