"""How much of a change that a merge makes to a model's outputs is rounding, by a measurement.

Merged and unmerged, a model computes the same in another order, with weights that were rounded once
more. What such errors become further up is found by a forward pass with random ones of their size:
where the merge changed the outputs by much more, it has done something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Operation
from lorakit.methods.lora.with_weights import with_weights
from lorakit.models.base import base_parameter
from lorakit.models.routers import is_own_kind

LIMIT = 10.0
"""The largest ratio of a merge's change to the expected one.

Of 819 right merges (benchmarks/results/merge_rounding.json) the largest was 2.2, so the limit is
more than four times that. With one layer lost the median is 129 and more in float32; in half
precision a small layer is lost in the noise.
"""


class RoundingErrors(Operation):
    """Adds random errors to what a layer computes, or to what is read of it."""

    def __init__(self, size: float) -> None:
        """Set the size of the errors.

        Args:
            size: as a share of each vector's root mean square, beyond the precision of the result.
        """
        self._size = size
        self._generator = torch.Generator().manual_seed(0)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The output with errors."""
        return self._with_errors(output)

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The weight with errors, where it is not the layer's own output that has them."""
        return weight if inside else self._with_errors(weight)

    def _with_errors(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
            return x
        noise = torch.randn(x.shape, generator=self._generator).to(x.device)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        size = exact.square().mean(-1, keepdim=True).sqrt()
        # Models in float64 compute some things in float32 all the same: softmax, norms.
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
        return (exact + noise * size * (self._size + eps)).to(x.dtype)


class RouterErrors(RoundingErrors):
    """Adds random errors to a router's weight: all that it returns comes from it."""

    replaces_output = True

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The output with errors."""
        weight = self._with_errors(base_parameter(layer, "weight"))
        return with_weights(layer, {"weight": weight}, inputs)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """How far two outputs are from each other: the largest difference along the last dimension.

    It is the median over all positions, since a router may send single tokens another way.
    """
    gaps = (ours - theirs).abs()
    return gaps.amax(-1).median().item() if gaps.dim() else gaps.item()


def rounding_errors(
    layers: Mapping[int, AdaptedLayer], sizes: Mapping[str, float]
) -> dict[int, Operation]:
    """The operations that give merged layers random errors, by the layers' numbers.

    Args:
        layers: by number.
        sizes: of the errors in their weights, as shares of them, by the weights' names.
    """
    found: dict[int, Operation] = {}
    for number, layer in layers.items():
        inside = f"{layer.adapter_path}."
        own = (size for name, size in sizes.items() if name.startswith(inside))
        kind = RouterErrors if is_own_kind(layer) else RoundingErrors
        found[number] = kind(max(own, default=0.0))
    return found


def is_rounding(before: Tensor, after: Tensor, moved: Tensor) -> bool:
    """Whether the change of a merge is about as large as that of random errors.

    Args:
        before: the outputs with the adapter attached.
        after: the outputs with the adapter merged.
        moved: those with random errors too.
    """
    expected = distance(moved, after)
    # Outputs beyond the precision's range say nothing.
    unknown = not (before.isfinite().all() and math.isfinite(expected))
    return unknown or distance(before, after) <= LIMIT * expected
