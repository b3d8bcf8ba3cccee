"""`lorakit.kernels.norms_and_gates` in Triton: one pass over the activations for each function.

Rounded where plain torch rounds. `lorakit.kernels.norms_and_gates` calls this module; importing it
imports Triton.
"""

from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.kernels.tuning_triton import autotuned, is_many

# The kernels have no shape checks (`no_type_check`), because Triton reads their source.


def _usual_warps(
    configs: list[triton.Config], arguments: Mapping[str, Any], **others: Any
) -> list[triton.Config]:
    """Return what is tried for norms: a warp for each 256 features, or half or twice as many."""
    usual = min(16, max(1, others["BLOCK"] // 256))
    factor = 2 if others["MANY"] else 1
    return [c for c in configs if usual <= c.num_warps * factor <= usual * factor**2]


_tuned_norm = autotuned(
    [triton.Config({}, num_warps=warps) for warps in (4, 1, 2, 8, 16, 32)],
    key=["BLOCK"],
    prune=_usual_warps,
)
_tuned_gate = autotuned(
    [
        triton.Config({"BLOCK": elements}, num_warps=warps)
        for elements, warps in ((1024, 4), (2048, 8), (4096, 8))
    ],
    key=["KIND"],
)


@_tuned_norm
@triton.jit
@no_type_check
def _norm(x, weight, y, inverse, eps, d, MANY: tl.constexpr, BLOCK: tl.constexpr):
    """One token: y = weight·x/√(mean(x²) + eps), and what x was multiplied with."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < d
    exact = tl.load(x + token * d + column, mask=live, other=0.0).to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(exact * exact) / d + eps)
    rounded = (exact * root).to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + token * d + column, (rounded * factor).to(y.dtype.element_ty), mask=live)
    tl.store(inverse + token, root)


@_tuned_norm
@triton.jit
@no_type_check
def _norm_gradient(grad, x, weight, inverse, out, d, MANY: tl.constexpr, BLOCK: tl.constexpr):
    """One token: out = (g − n·mean(g·n))·inverse, for n = x·inverse and g = grad·weight."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < d
    place = token * d + column
    root = tl.load(inverse + token)
    n = tl.load(x + place, mask=live, other=0.0).to(tl.float32) * root
    factor = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    product = tl.load(grad + place, mask=live, other=0.0).to(tl.float32) * factor
    g = product.to(grad.dtype.element_ty).to(tl.float32)
    mean = tl.sum(g * n) / d
    tl.store(out + place, ((g - n * mean) * root).to(out.dtype.element_ty), mask=live)


@triton.jit
@no_type_check
def _sigmoid(x):
    # exp of a negative number alone cannot overflow.
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
@no_type_check
def _activation(x, KIND: tl.constexpr):
    """The activation and its derivative, in float32."""
    if KIND == "silu":
        share = _sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    if KIND == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # √½
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1/√(2π)
        return x * share, share + x * density
    # 2·√(2/π): tanh is written with a sigmoid, as Triton has no tanh for every device.
    share = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, share + x * share * (1.0 - share) * slope


@_tuned_gate
@triton.jit
@no_type_check
def _gated(gate, up, out, count, KIND: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < count
    x = tl.load(gate + place, mask=live, other=0.0).to(tl.float32)
    value, _ = _activation(x, KIND)
    rounded = value.to(out.dtype.element_ty).to(tl.float32)
    product = rounded * tl.load(up + place, mask=live, other=0.0).to(tl.float32)
    tl.store(out + place, product.to(out.dtype.element_ty), mask=live)


@_tuned_gate
@triton.jit
@no_type_check
def _gated_gradients(
    grad,
    gate,
    up,
    for_gate,
    for_up,
    count,
    KIND: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < count
    x = tl.load(gate + place, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=live, other=0.0).to(tl.float32)
    value, slope = _activation(x, KIND)
    rounded = value.to(for_up.dtype.element_ty).to(tl.float32)
    tl.store(for_up + place, (g * rounded).to(for_up.dtype.element_ty), mask=live)
    product = g * tl.load(up + place, mask=live, other=0.0).to(tl.float32)
    inner = product.to(for_gate.dtype.element_ty).to(tl.float32)
    tl.store(for_gate + place, (inner * slope).to(for_gate.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x, and 1/√(mean(x²) + eps) in float32, one per token."""
    x = x.contiguous()
    y = torch.empty_like(x)
    inverse = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _norm[(inverse.numel(),)](x, weight, y, inverse, eps, x.shape[-1], **_line(x))
    return y, inverse


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of the norm's input."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _norm_gradient[(inverse.numel(),)](grad, x, weight, inverse, out, x.shape[-1], **_line(x))
    return out


def _line(x: Tensor) -> dict[str, int]:
    """Return how a program holds one token: all its features at once."""
    return {"BLOCK": triton.next_power_of_2(x.shape[-1]), "MANY": is_many(x)}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate)·up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _gated[_programs(gate)](gate, up, out, gate.numel(), KIND=activation, MANY=is_many(gate))
    return out


def gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        _gated_gradients[_programs(gate)](
            grad,
            gate,
            up,
            for_gate,
            for_up,
            gate.numel(),
            KIND=activation,
            MANY=is_many(gate),
        )
    return for_gate, for_up


def _programs(x: Tensor) -> Callable[[Mapping[str, Any]], tuple[int]]:
    """Return how many programs a configuration needs."""
    count = x.numel()
    return lambda chosen: (triton.cdiv(count, chosen["BLOCK"]),)
