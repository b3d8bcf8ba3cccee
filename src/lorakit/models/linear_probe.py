"""What a subclass of Linear computes, found out by a probe: a matmul, something else, or nothing.

Routers of some mixtures of experts are Linears that return scores and choices; FP8 layers need a
kernel that may not be there.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.models.quantized_weight import is_quantized
from lorakit.upstream.private_names import own_parameters


def own_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, also while it is adapted."""
    return cast(type[nn.Module], getattr(layer, "own_class", type(layer)))


def returns_tensor(layer: nn.Module) -> bool:
    """Whether a linear layer's output is one tensor, as far as it can be computed here."""
    if not isinstance(layer, nn.Linear) or own_class(layer).forward is nn.Linear.forward:
        return True
    return is_quantized(layer) or layer.weight.is_meta or not isinstance(answer(layer), tuple)


@torch.no_grad()
def answer(layer: nn.Linear) -> object:
    """What a layer's own forward pass returns for one row, or the exception that it raises."""
    weight = layer.weight
    dtype = weight.dtype if weight.itemsize > 1 else torch.float32
    x = torch.linspace(-1, 1, layer.in_features, device=weight.device).to(dtype)[None]
    try:
        return own_class(layer).forward(layer, x)
    # A kernel may be missing, or fail on this device, with any type of error.
    except Exception as error:
        return error


@torch.no_grad()
def why_no_matmul(layer: nn.Linear) -> str | None:
    """Why a layer's forward pass is not W·x + b; None: it is, or its weight is on meta."""
    if layer.weight.is_meta:
        return None
    found = answer(layer)
    if isinstance(found, Exception):
        reason = next(iter(str(found).splitlines()), "")
        return f"its forward pass fails here: {type(found).__name__}: {reason}"
    if isinstance(found, tuple):
        return f"it returns {len(found)} values"
    weight = layer.weight
    extra = own_parameters(layer).keys() - {"weight", "bias"}
    if extra or not isinstance(found, Tensor) or weight.itemsize == 1:
        return f"it has {', '.join(sorted(extra)) or 'arithmetic of its own'}"
    x = torch.linspace(-1, 1, layer.in_features, device=weight.device).to(weight.dtype)[None]
    expected = F.linear(x, weight, layer.bias)
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=0.02, atol=1e-3)
    return None if same else "it computes something else than W·x + b"
