"""Root-mean-square norms and gated activations of frozen blocks, which keep only what they need.

Autograd keeps a float32 copy of a norm's input and, for act(gate)·up, the activation beside gate
and up. Here a norm keeps its input and one number per token, a gated activation gate and up; the
backward pass computes the rest again, in half the time of autograd's chain of small steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.kernels import liger

GateActivation = Literal["silu", "gelu", "gelu_tanh"]

_ATEN = torch.ops.aten
_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, str]]] = {
    "silu": (F.silu, _ATEN.silu_backward.grad_input, {}),
    "gelu": (F.gelu, _ATEN.gelu_backward.grad_input, {}),
    "gelu_tanh": (F.gelu, _ATEN.gelu_backward.grad_input, {"approximate": "tanh"}),
}


def rms_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*rows d"]:
    """weight·x/√(mean(x²) + eps), with the roundings of transformers' Llama.

    The quotient is computed in float32 and rounded to the precision of x before it is multiplied.

    Args:
        x: activations; those of float64 are rounded to float32 too, as in transformers.
        weight: frozen: it gets no gradient.
        eps: added to the mean square.
    """
    if liger.is_usable(x) and x.shape[-1] <= liger.WIDEST:
        return liger.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def gated(
    gate: Float[Tensor, "*rows d"], up: Float[Tensor, "*rows d"], activation: GateActivation
) -> Float[Tensor, "*rows d"]:
    """activation(gate)·up (SwiGLU and GeGLU, Shazeer 2020)."""
    return _Gated.apply(gate, up, activation)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return _rms_norm_gradient(grad, x, weight, inverse), None, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x, and 1/√(mean(x²) + eps) in float32, one per token."""
    exact = x.float()
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * (exact * inverse).to(x.dtype), inverse


def _rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x: (g − n·mean(g·n))·inverse, for n = x·inverse, g = grad·weight."""
    g = (grad * weight).to(torch.float32, copy=True)
    n = x.float() * inverse
    mean = torch.linalg.vecdot(g, n).unsqueeze(-1) / x.shape[-1]
    return g.addcmul_(n, mean, value=-1).mul_(inverse).to(x.dtype)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: GateActivation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        # The backward pass is the one that goes with it, whatever is chosen by then.
        ctx.in_liger = (
            activation in liger.GATES and gate.shape[-1] <= liger.WIDEST and liger.is_usable(gate)
        )
        if ctx.in_liger:
            return liger.gated(gate, up, activation)
        function, _, options = _ACTIVATIONS[activation]
        return function(gate, **options).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gradients = liger.gated_gradients if ctx.in_liger else _gated_gradients
        return *gradients(grad, gate, up, ctx.activation), None


def _gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, activation: GateActivation
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, with no more memory than they take themselves."""
    function, gradient, options = _ACTIVATIONS[activation]
    for_up = function(gate, **options).mul_(grad)
    for_gate = grad * up
    return gradient(for_gate, gate, grad_input=for_gate, **options), for_up
