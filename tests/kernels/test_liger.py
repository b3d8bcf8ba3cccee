"""Where liger-kernel's kernels stand in for plain torch, and that they compute the same."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kernels.triton_process import needs_gpu, run_checks
from lorakit.kernels import choice, liger, norms_and_gates
from lorakit.kernels.cross_entropy import head_cross_entropy
from lorakit.kernels.logit_transform import LogitTransform

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="liger-kernel is not installed (the extra gpu)",
)


@needs_liger
@pytest.mark.gpu
@needs_gpu
def test_liger_equals_plain_torch_on_the_device():
    run_checks("liger_checks.py", TRITON_INTERPRET="0")


@needs_liger
@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_vocabulary_agrees_with_plain_torch_on_the_device(dtype):
    torch.manual_seed(0)
    head = nn.Linear(256, 49152, bias=False, dtype=dtype, device="cuda").requires_grad_(False)
    hidden = torch.randn(700, 256, dtype=dtype, device="cuda", requires_grad=True)
    targets = torch.randint(-1, 49152, (700,), device="cuda")
    weights = torch.rand(700, device="cuda")
    results = []
    for kernels in ("auto", "plain"):
        total, losses = head_cross_entropy(
            hidden, head, targets, weights, label_smoothing=0.1, z_loss=1e-4, kernels=kernels
        )
        results.append((losses, *torch.autograd.grad(total, hidden)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    bound = max(4 * torch.finfo(dtype).eps, 1e-5) * results[1][1].abs().max().item()
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=bound)


@pytest.fixture
def stand_in(monkeypatch):
    """A liger-kernel in plain torch, for tensors on the CPU; the names of what is called."""
    calls = []

    class CrossEntropy:
        @staticmethod
        def apply(logits, targets, weight, ignored, z_loss, smoothing, reduction, cap):
            calls.append("cross-entropy")
            assert (weight, reduction) == (None, "none")
            x = logits if cap is None else cap * torch.tanh(logits / cap)
            losses = nn.functional.cross_entropy(
                x, targets, ignore_index=ignored, reduction=reduction, label_smoothing=smoothing
            )
            return losses + z_loss * x.logsumexp(-1).square() * (targets != ignored), None

    class RMSNorm:
        @staticmethod
        def apply(x, weight, eps, offset, casting, in_place):
            calls.append("norm")
            assert (offset, casting, in_place) == (0.0, "llama", False)
            return nn.functional.rms_norm(x, weight.shape, weight, eps)

    ops: Any = ModuleType("liger_kernel.ops")
    ops.LigerCrossEntropyFunction, ops.LigerRMSNormFunction = CrossEntropy, RMSNorm
    for name, function in (("swiglu", nn.functional.silu), ("geglu", nn.functional.gelu)):
        module = ModuleType(f"liger_kernel.ops.{name}")

        def forward(gate, up, function=function, name=name):
            calls.append(name)
            return gate, up, function(gate) * up

        setattr(module, f"{name}_forward", forward)
        setattr(module, f"{name}_backward", lambda gate, up, grad: (gate.zero_(), up.zero_()))
        setattr(ops, name, module)
    package: Any = ModuleType("liger_kernel")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setattr(liger, "is_usable", lambda x: choice.fast() and x.dtype == torch.float32)
    return calls


def loss(**options):
    torch.manual_seed(0)
    head = nn.Linear(6, 37).requires_grad_(False)
    hidden = torch.randn(7, 6, requires_grad=True)
    targets = torch.tensor([1, 2, -1, 36, 0, 5, -100])
    total, losses = head_cross_entropy(hidden, head, targets, torch.rand(7), **options)
    return total, losses, *torch.autograd.grad(total, hidden)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 0.02},
        {"label_smoothing": 0.1, "change": LogitTransform(scale=-0.5, cap=2.0)},
    ],
)
def test_the_loss_is_ligers_with_the_same_arguments(stand_in, options):
    found = loss(**options)
    assert stand_in == ["cross-entropy"]
    for ours, plain in zip(found, loss(**options, kernels="plain"), strict=True):
        torch.testing.assert_close(ours, plain)
    assert stand_in == ["cross-entropy"]


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_tokens_with_values_of_their_own_stay_with_plain_torch(stand_in, name):
    loss(**{name: torch.linspace(0, 0.5, 7)})
    assert stand_in == []


def test_norms_and_gates_are_ligers_where_it_has_them(stand_in):
    x, weight = torch.randn(4, 24), torch.ones(24)
    norms_and_gates.rms_norm(x, weight, 1e-5)
    for activation in ("silu", "gelu_tanh", "gelu"):
        norms_and_gates.gated(x, x, activation)
    assert stand_in == ["norm", "swiglu", "geglu"]


def test_the_backward_pass_goes_with_the_forward_pass(stand_in):
    gate, up = torch.randn(4, 24, requires_grad=True), torch.randn(4, 24)
    y = norms_and_gates.gated(gate, up, "silu")
    with choice.use("plain"):
        (found,) = torch.autograd.grad(y.sum(), gate)
    # The stand-in's gradient; it may write over what it is given, and the inputs stay.
    assert not found.any()
    assert gate.all()


@pytest.mark.parametrize("width", [liger.WIDEST, liger.WIDEST + 1])
def test_rows_that_liger_cannot_hold_stay_with_plain_torch(stand_in, width):
    x = torch.zeros(1, width)
    norms_and_gates.rms_norm(x, x[0], 1e-5)
    norms_and_gates.gated(x, x, "silu")
    assert stand_in == (["norm", "swiglu"] if width == liger.WIDEST else [])


def test_the_switch_turns_liger_off(stand_in):
    x = torch.randn(4, 24)
    with choice.use("plain"):
        norms_and_gates.rms_norm(x, x[0], 1e-5)
        norms_and_gates.gated(x, x, "silu")
        loss()
    assert stand_in == []


LATE = """
import sys
import torch
from lorakit.kernels import liger, norms_and_gates
from lorakit.kernels.cross_entropy import head_cross_entropy
x = torch.ones(2, 4, requires_grad=True)
norms_and_gates.rms_norm(x, x[0].detach(), 1e-5)
norms_and_gates.gated(x, x, "silu")
head_cross_entropy(x, torch.nn.Identity(), torch.tensor([1, 2]), torch.ones(2))
assert not liger.is_usable(x)
assert not any(name.partition(".")[0] == "liger_kernel" for name in sys.modules)
"""


@pytest.mark.thorough
def test_on_a_cpu_liger_is_not_even_imported(forks):
    forks.run(LATE)
