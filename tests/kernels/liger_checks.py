"""liger-kernel in the places of plain torch, on a GPU, or in Triton's interpreter.

`test_liger.py` runs this file in a process of its own.
"""

import os
from typing import Any

import numpy
import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from lorakit.kernels import choice, liger
from lorakit.kernels import norms_and_gates as plain
from lorakit.kernels.cross_entropy import head_cross_entropy
from lorakit.kernels.logit_transform import LogitTransform

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts bfloat16 off instead of rounding it.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
TOKENS, D = 5, 8
# The interpreter's sigmoid, as a GPU's, is 1 / (1 + exp(-x)), which is 0 where exp overflows.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def rsqrt(x):
    return 1 / tl.sqrt(x)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """Let the interpreter run what only the compiler knows: CUDA's own functions, typed numbers."""
    if not INTERPRETED:
        yield
        return
    from liger_kernel.ops import cross_entropy, geglu, rms_norm
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "tanh", tanh)
        patch.setattr(geglu, "tanh", tanh)
        patch.setattr(rms_norm, "rsqrt", rsqrt)
        convert = interpreter._implicit_cvt

        def typed(value):
            if not isinstance(value, float):
                return convert(value)
            handle = interpreter.TensorHandle(numpy.array([value], numpy.float32), tl.float32)
            return tl.tensor(handle, tl.float32)

        patch.setattr(interpreter, "_implicit_cvt", typed)
        patch.setattr(liger, "is_usable", lambda x: choice.fast() and x.dtype != torch.float64)
        yield


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Count what liger computes: a check in which it computes nothing says nothing."""
    found = []
    for name in ("rms_norm", "gated", "gated_gradients", "token_losses"):
        own = getattr(liger, name)

        def counted(*args, own=own, name=name, **kwargs):
            found.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(liger, name, counted)
    return found


def random(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def assert_near(found, wanted, *, units=3):
    assert found.dtype == wanted.dtype
    unit = max(torch.finfo(wanted.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found, wanted, rtol=0, atol=units * unit * wanted.abs().max().item())


def with_gradients(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, random(*y.shape, dtype=y.dtype, seed=9))


def both(function, *inputs):
    """Pairs of what liger and plain torch compute: the result and its gradients."""
    ours = with_gradients(function, *inputs)
    with choice.use("plain"):
        return zip(ours, with_gradients(function, *inputs), strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 24), pytest.param((5, 300), marks=pytest.mark.thorough)])
def test_a_norm_and_its_gradient(shape, dtype, calls):
    weight = random(shape[-1], dtype=dtype, seed=2)
    for found, wanted in both(
        lambda x: plain.rms_norm(x, weight, 1e-5), random(*shape, dtype=dtype)
    ):
        assert_near(found, wanted)
    assert calls == ["rms_norm"]


def test_a_norm_leaves_the_gradient_that_it_gets(calls):
    x = random(4, 24).requires_grad_()
    grad = random(4, 24, seed=1)
    before = grad.clone()
    torch.autograd.grad(plain.rms_norm(x, random(24, seed=2), 1e-5), x, grad)
    assert torch.equal(grad, before)
    assert calls == ["rms_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_gated_activation_and_its_gradients(activation, dtype, calls):
    gate, up = (3 * random(2, 7, 300, dtype=dtype, seed=seed) for seed in range(2))
    for found, wanted in both(lambda g, u: plain.gated(g, u, activation), gate, up):
        assert_near(found, wanted)
    # liger has no gate with the exact GELU.
    assert calls == ([] if activation == "gelu" else ["gated", "gated_gradients"])


@pytest.mark.parametrize("activation", liger.GATES)
def test_gate_and_up_are_as_before_after_the_backward_pass(activation, calls):
    gate, up = (random(4, 24, seed=seed).requires_grad_() for seed in range(2))
    before = gate.detach().clone(), up.detach().clone()
    y = plain.gated(gate, up, activation)
    first = torch.autograd.grad(y.sum(), (gate, up), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (gate, up))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    assert calls


@pytest.mark.parametrize("activation", liger.GATES)
def test_large_values_stay_finite(activation):
    gate = torch.tensor([[-3e4, -100.0, 0.0, 100.0, 3e4]], device=DEVICE)
    for found, wanted in both(
        lambda g, u: plain.gated(g, u, activation), gate, torch.ones_like(gate)
    ):
        torch.testing.assert_close(found, wanted)


def test_inputs_need_not_be_contiguous(calls):
    gate = random(2, 40, 3).transpose(1, 2)
    up = random(2, 3, 40, seed=1)
    weight = up[0, 0].clone()
    for function in (
        lambda x: plain.gated(x, up, "silu"),
        lambda x: plain.rms_norm(x, weight, 1e-5),
    ):
        ours = function(gate)
        with choice.use("plain"):
            assert_near(ours, function(gate))
    assert calls == ["gated", "rms_norm"]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.02},
    "all": {"label_smoothing": 0.1, "z_loss": 0.02},
    "scaled": {"change": LogitTransform(scale=0.25)},
    "capped": {"change": LogitTransform(cap=1.5)},
    "all, scaled and capped": {
        "label_smoothing": 0.1,
        "z_loss": 0.02,
        "change": LogitTransform(scale=-0.5, cap=30.0),
    },
    "each its own": {
        "label_smoothing": torch.linspace(0, 0.5, TOKENS),
        "z_loss": torch.linspace(0.1, 0, TOKENS),
    },
}


def made(vocabulary, *, dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(D, vocabulary).requires_grad_(False)
    return torch.randn(TOKENS, D).mul(3).to(DEVICE, dtype), head.to(DEVICE, dtype)


def answer(hidden, head, kernels, **options):
    """Total, losses, and the gradient of the hidden states."""
    torch.manual_seed(1)
    targets = torch.randint(head.out_features, (TOKENS,))
    targets[1] = -7
    weights = torch.rand(TOKENS, device=DEVICE)
    leaf = hidden.detach().requires_grad_()
    total, losses = head_cross_entropy(
        leaf, head, targets.to(DEVICE), weights, chunk_tokens=2, kernels=kernels, **options
    )
    total.backward()
    return total.detach(), losses, leaf.grad


@pytest.mark.parametrize("vocabulary", [70, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradient_equal_plain_torch(vocabulary, options, calls):
    for dtype in DTYPES:
        hidden, head = made(vocabulary, dtype=dtype)
        found, wanted = (
            answer(hidden, head, kernels, **OPTIONS[options]) for kernels in ("auto", "plain")
        )
        for ours, theirs in zip(found[:2], wanted[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        bound = max(4 * torch.finfo(dtype).eps * wanted[2].abs().max().item(), 1e-6)
        torch.testing.assert_close(found[2], wanted[2], rtol=0, atol=bound)
    # liger has one label smoothing and one z-loss for all tokens.
    assert len(calls) == (0 if options == "each its own" else 3 * len(DTYPES))


def test_a_head_with_trained_parameters_has_the_gradients_of_plain_torch(calls):
    hidden, head = made(70)
    head.requires_grad_(True)
    gradients = []
    for kernels in ("auto", "plain"):
        answer(hidden, head, kernels, **OPTIONS["all"])
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
        head.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert calls


def test_logits_of_minus_infinity_have_no_share():
    logits = random(2, 70)
    logits[0, :-1] = -torch.inf
    targets = torch.tensor([69, 0], device=DEVICE)
    results = []
    for kernels in ("auto", "plain"):
        leaf = logits.clone().requires_grad_()
        weights = torch.ones(2, device=DEVICE)
        total, _ = head_cross_entropy(leaf, nn.Identity(), targets, weights, kernels=kernels)
        total.backward()
        results.append((total.detach(), leaf.grad))
    assert torch.isfinite(results[0][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_only_a_token_with_a_target_sees_what_is_not_a_number():
    logits = random(3, 70)
    logits[:2, 1] = torch.nan
    targets = torch.tensor([0, -100, 2], device=DEVICE)
    leaf = logits.requires_grad_()
    weights = torch.ones(3, device=DEVICE)
    total, losses = head_cross_entropy(leaf, nn.Identity(), targets, weights)
    assert losses.isnan().tolist() == [True, False, False]
    total, _ = head_cross_entropy(leaf[1:], nn.Identity(), targets[1:], weights[1:])
    total.backward()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[1].any()


def test_logits_that_are_given_stay_as_they_are():
    logits = random(2, 70)
    before = logits.clone()
    targets, weights = torch.tensor([0, 1], device=DEVICE), torch.ones(2, device=DEVICE)
    head_cross_entropy(logits, nn.Identity(), targets, weights)
    assert torch.equal(logits, before)
