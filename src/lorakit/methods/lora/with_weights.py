"""LoRA on a module that uses its weights in its own code: it computes with the changed weights.

No call of a layer lies between, after which B·A·x could be added. So the module computes as a copy
of it would that has W + scale·B·A.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.methods.lora.parameter_update import ParameterUpdate
from lorakit.upstream.private_names import own_parameters


class WithWeightsUpdate(ParameterUpdate):
    """All that one adapter does to one module that computes with the changed weights."""

    replaces_output = True

    @staticmethod
    @abstractmethod
    def weights(
        layer: nn.Module,
        terms: Sequence[tuple[ParameterUpdate, float]],
        *,
        exact: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The module's parameters plus the sum of weight·scale·B·A, by name.

        Args:
            layer: the module.
            terms: updates and their weights.
            exact: precision of the sum and the result; None: summed in float32 or better, and
                rounded to the parameter's own.
        """

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The module's output with W + scale·B·A in the place of each W."""
        return with_weights(layer, self.weights(layer, [(self, 1.0)]), inputs)

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter plus ΔW."""
        with torch.no_grad():
            yield from self.weights(layer, [(self, 1.0)], exact=exact).items()


def with_sum(
    layer: nn.Module,
    terms: Sequence[tuple[WithWeightsUpdate, float]],
    inputs: tuple[Any, ...],
) -> Any:
    """What a module computes of inputs with the weighted sum of updates; none: the base's output.

    What it computes is not linear in its weights, so these are summed and not the outputs.
    """
    weights = type(terms[0][0]).weights(layer, terms) if terms else {}
    return with_weights(layer, weights, inputs)


def with_weights(layer: nn.Module, weights: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Any:
    """What a module computes of inputs, with other values of some of its parameters.

    The module is not changed: other threads may use it meanwhile.
    """
    kind = layer.own_class if isinstance(layer, AdaptedLayer) else type(layer)
    double = object.__new__(kind)
    vars(double).update(vars(layer))
    vars(double)["_parameters"] = {**own_parameters(layer), **weights}
    return kind.forward(double, *inputs)
