"""A layer's weight as a matrix of floats, whether it is stored as floats or in a few bits."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor, nn

from lorakit.upstream.private_names import own_parameters


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' whose weight is in 4 or 8 bits."""
    # A model with such a layer has imported the library; importing lorakit must not.
    library: Any = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(layer, nn.Linear):
        return False
    kinds = (library.nn.Linear4bit, library.nn.Linear8bitLt)
    return isinstance(layer, kinds) and not own_weight(layer).is_floating_point()


def own_weight(layer: nn.Module) -> Tensor:
    """The parameter itself, also where the attribute `weight` adds an adapter's ΔW."""
    own = own_parameters(layer).get("weight")
    # What a parametrization makes of other parameters is no parameter of the layer's own.
    return cast(Tensor, layer.weight) if own is None else own


def float_weight(layer: nn.Module) -> Tensor:
    """A layer's weight as floats, in the layer's own shape.

    Of a quantised layer it is made anew at each call, (d_out, d_in), also where the layer was a
    Conv1D; of any other it is the parameter itself, which must not be written to.

    Raises:
        ModelError: bitsandbytes has packed the weight for inference, which loses some of it.
    """
    if not is_quantized(layer):
        return own_weight(layer)
    # Imported late: it needs bitsandbytes.
    from lorakit.models.quantized_layers import dequantized

    return dequantized(layer)
