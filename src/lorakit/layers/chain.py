"""Several updates of one adapter on one layer, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.layers.operation import Update


class Chain(Update):
    """Updates each of which adapts the output of the one before: LoRA, then a bottleneck."""

    def __init__(self, links: Sequence[Update]) -> None:
        super().__init__()
        self.links = nn.ModuleList(links)
        self.replaces_output = links[0].replaces_output
        self.is_whole = any(link.is_whole for link in links)
        tokens = (link.virtual_tokens for link in links if link.virtual_tokens)
        self.virtual_tokens = next(tokens, None)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The output of the last update."""
        for link in self._updates():
            output = link.adapt(layer, inputs, output)
        return output

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The value that is read in place of a parameter, after each update."""
        for link in self._updates():
            weight = link.read(name, weight, inside=inside)
        return weight

    def let_train(self) -> None:
        """Let the weights of each update take gradients."""
        for link in self._updates():
            link.let_train()

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged parameters of each update."""
        for link in self._updates():
            yield from link.merged(layer, exact=exact)

    def why_unmergeable(self, layer: nn.Module) -> str | None:
        """Why one of them can't be merged; None: all can."""
        reasons = (link.why_unmergeable(layer) for link in self._updates())
        return next((why for why in reasons if why), None)

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensors of each update."""
        for link in self._updates():
            yield from link.named_tensors(path)

    def shared_tensors(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Yield what the updates have of others."""
        for link in self._updates():
            yield from link.shared_tensors(path)

    def _updates(self) -> list[Update]:
        return [cast(Update, link) for link in self.links]
