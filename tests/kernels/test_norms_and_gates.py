"""Norms and gated activations of frozen blocks against the plain lines that they stand for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels.norms_and_gates import gated, rms_norm

ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def plain_norm(x, weight, eps):
    exact = x.to(torch.float32)
    rounded = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return weight * rounded.to(x.dtype)


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    weights = random(*y.shape, dtype=y.dtype, seed=9)
    return y, *torch.autograd.grad(y, leaves, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_equals_that_of_transformers(dtype):
    x, weight = random(2, 5, 24, dtype=dtype), random(24, dtype=dtype, seed=1)
    found, slope = with_gradients(lambda x: rms_norm(x, weight, 1e-5), x)
    wanted, own_slope = with_gradients(lambda x: plain_norm(x, weight, 1e-5), x)
    assert torch.equal(found, wanted)
    # The norm is in float32 in every precision.
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(slope, own_slope, rtol=0, atol=4 * unit * own_slope.abs().max())


def test_a_norms_gradient_is_that_of_exact_arithmetic():
    x, weight = random(3, 24, dtype=torch.float32), random(24, dtype=torch.float32, seed=1)
    _, slope = with_gradients(lambda x: rms_norm(x, weight, 1e-5), x)
    weights = random(3, 24, dtype=torch.float32, seed=9)
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(
        F.rms_norm(leaf, (24,), weight.double(), 1e-5), leaf, weights.double()
    )
    torch.testing.assert_close(slope.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_activation_equals_its_plain_lines_bit_for_bit(name, dtype):
    gate, up = (3 * random(2, 5, 24, dtype=dtype, seed=seed) for seed in (0, 1))
    ours = with_gradients(lambda g, u: gated(g, u, name), gate, up)
    plain = with_gradients(lambda g, u: ACTIVATIONS[name](g) * u, gate, up)
    assert all(torch.equal(*pair) for pair in zip(ours, plain, strict=True))


def test_only_what_is_needed_is_kept():
    x, weight = random(4, 24, dtype=torch.bfloat16).requires_grad_(), torch.ones(24).bfloat16()
    gate, up = (random(4, 24, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rms_norm(x, weight, 1e-5)
        gated(gate, up, "silu")
    assert [k.shape for k in kept] == [x.shape, weight.shape, (4, 1), gate.shape, up.shape]
    assert all(any(k is own for own in (x, weight, gate, up)) for k in kept if k.shape != (4, 1))
