"""The kernels of liger-kernel (Hsu et al. 2024), where they compute just what plain torch would.

Cross-entropy, norms and gated activations call them on a GPU if the extra `gpu` is installed. What
they cannot do, such as a label smoothing of its own for each token, stays with plain torch. Nothing
here imports liger-kernel before it is used.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorakit.kernels.grouping import choose_kernels

WIDEST = 65_536
"""Features of a token up to which liger's norms and gated activations hold them all at once."""
GATES = ("silu", "gelu_tanh")
"""The activations that liger has a gated kernel for."""


def is_usable(x: Tensor) -> bool:
    """Whether liger may compute with a tensor: on a GPU, in at most 32 bits, if installed.

    `kernels.choice` decides as it does for our own Triton kernels.
    """
    on_gpu = x.is_cuda and choose_kernels("auto", x.device, x.dtype) == "triton"
    return on_gpu and x.numel() > 0 and is_installed()


@functools.cache
def is_installed() -> bool:
    """Whether liger-kernel can be imported."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError:
        return False
    return True


def rms_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*rows d"]:
    """weight·x/√(mean(x²) + eps) with the roundings of transformers' Llama, and its gradient."""
    from liger_kernel.ops import LigerRMSNormFunction

    # Without an offset on the weight, and not over the gradient that the next layer handed down,
    # which a residual connection needs once more.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def gated(
    gate: Float[Tensor, "*rows d"], up: Float[Tensor, "*rows d"], activation: str
) -> Float[Tensor, "*rows d"]:
    """activation(gate)·up, for one of `GATES`."""
    forward, _ = _gate_kernels(activation)
    return forward(gate.contiguous(), up.contiguous())[2]


def gated_gradients(
    grad: Float[Tensor, "*rows d"],
    gate: Float[Tensor, "*rows d"],
    up: Float[Tensor, "*rows d"],
    activation: str,
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
    """The gradients of gate and up."""
    _, backward = _gate_kernels(activation)
    # liger writes the gradients over what it is given, and others may hold gate and up.
    own_gate, own_up = (x.clone(memory_format=torch.contiguous_format) for x in (gate, up))
    of_gate, of_up = backward(own_gate, own_up, grad.contiguous())
    return of_gate, of_up


def _gate_kernels(activation: str) -> tuple[Any, Any]:
    from liger_kernel.ops import geglu, swiglu

    if activation == "silu":
        return swiglu.swiglu_forward, swiglu.swiglu_backward
    return geglu.geglu_forward, geglu.geglu_backward


def token_losses(
    logits: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    cap: float | None = None,
    wants_gradient: bool = True,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocabulary"] | None]:
    """Each token's loss, and the gradient of Σ weight·loss with regard to the logits.

    Args:
        logits: float32, since the losses have their precision; they are overwritten.
        targets: a negative number: none.
        weights: the factor on each token's loss, which only the gradient has in it.
        label_smoothing: share of the target probability that is spread over all tokens.
        z_loss: factor on the square of log Σ exp(logits).
        cap: bound c of c·tanh(logit/c), which is applied first; None: no bound.
        wants_gradient: False: the gradient is None.
    """
    from liger_kernel.ops import LigerCrossEntropyFunction

    leaf = logits.detach().requires_grad_(wants_gradient)
    own_targets = targets.where(targets >= 0, _NO_TARGET)
    with torch.enable_grad():
        losses = LigerCrossEntropyFunction.apply(
            leaf, own_targets, None, _NO_TARGET, z_loss, label_smoothing, "none", cap
        )[0]
    gradient = torch.autograd.grad(losses, leaf, weights)[0] if wants_gradient else None
    return losses.detach(), gradient


_NO_TARGET = -100
