"""The Triton kernels of blocks against plain torch, on a GPU or where TRITON_INTERPRET=1.

`test_interpreter.py` and, on a GPU, `test_blocks.py` run this file in a process of its own, because
the interpreter is chosen when Triton is imported, which other tests do too.
"""

import os

import pytest
import torch
import triton

from lorakit.kernels import norms_and_gates as blocks
from lorakit.kernels import norms_and_gates_triton as blocks_triton
from lorakit.kernels.tuning_triton import is_many

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter cuts bfloat16 off instead of rounding it.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def random(*shape, dtype, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def assert_near(found, wanted, *, units=2):
    assert found.dtype == wanted.dtype
    unit = max(torch.finfo(wanted.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found, wanted, rtol=0, atol=units * unit * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 24), (5, 300)])
def test_a_norm_and_its_gradient(shape, dtype):
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[-1], dtype=dtype, seed=2)
    y, inverse = blocks_triton.rms_norm(x, weight, 1e-5)
    plain_y, plain_inverse = blocks._rms_norm(x, weight, 1e-5)
    assert_near(y, plain_y)
    assert_near(inverse, plain_inverse)
    found = blocks_triton.rms_norm_gradient(grad, x, weight, inverse)
    assert_near(found, blocks._rms_norm_gradient(grad, x, weight, plain_inverse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_gated_activation_and_its_gradients(activation, dtype):
    gate, up, grad = (3 * random(7, 300, dtype=dtype, seed=seed) for seed in range(3))
    function, _, options = blocks._ACTIVATIONS[activation]
    wanted = function(gate, **options).mul_(up)
    assert_near(blocks_triton.gated(gate, up, activation), wanted)
    ours = blocks_triton.gated_gradients(grad, gate, up, activation)
    plain = blocks._gated_gradients(grad, gate, up, activation)
    for found, own in zip(ours, plain, strict=True):
        assert_near(found, own)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_large_values_stay_finite(activation):
    gate = torch.tensor([[-3e4, -100.0, 0.0, 100.0, 3e4]], device=DEVICE)
    ones = torch.ones_like(gate)
    found = blocks_triton.gated_gradients(ones, gate, ones, activation)
    for ours, plain in zip(
        found, blocks._gated_gradients(ones, gate, ones, activation), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_inputs_need_not_lie_together():
    gate = random(2, 40, 3, dtype=torch.float32).transpose(1, 2)
    up = random(2, 3, 40, dtype=torch.float32, seed=1)
    assert_near(blocks_triton.gated(gate, up, "silu"), torch.nn.functional.silu(gate) * up)
    y, _ = blocks_triton.rms_norm(gate, up[0, 0], 1e-5)
    assert_near(y, blocks._rms_norm(gate, up[0, 0], 1e-5)[0])


NAMES = ["_norm", "_norm_gradient", "_gated", "_gated_gradients"]


@pytest.fixture
def tried(monkeypatch):
    """Let small calls be measured; return the runs of each kernel's configurations."""
    found = {}
    for name in NAMES:
        kernel, norm = getattr(blocks_triton, name), "norm" in name
        sizes = [({}, 1), ({}, 2), ({}, 4)] if norm else [({"BLOCK": 64}, 2), ({"BLOCK": 512}, 4)]
        configs = [triton.Config(size, num_warps=warps) for size, warps in sizes]
        runs = found.setdefault(name, [])

        def measure(call, quantiles, runs=runs):
            runs.append([call() for _ in range(2)])
            return [1.0 / len(runs)] * len(quantiles)

        monkeypatch.setattr(kernel, "configs", configs)
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel, "cache_results", False)
        monkeypatch.setitem(vars(kernel), "do_bench", measure)
    monkeypatch.setattr(blocks_triton, "is_many", lambda _: True)
    return found


def test_trying_configurations_changes_no_result(tried):
    test_a_norm_and_its_gradient((5, 300), torch.float32)
    test_a_gated_activation_and_its_gradients("silu", torch.float32)
    # 300 features have two warps as a rule.
    counts = {name: len(runs) for name, runs in tried.items()}
    assert counts == {"_norm": 3, "_norm_gradient": 3, "_gated": 2, "_gated_gradients": 2}


def test_configurations_are_tried_anew_for_another_width_activation_and_precision(tried):
    for width, dtype in ((300, torch.float32), (300, torch.float16), (2000, torch.float16)):
        test_a_norm_and_its_gradient((5, width), dtype)
    for activation in ("silu", "gelu", "gelu"):
        test_a_gated_activation_and_its_gradients(activation, torch.float32)
    # 2000 features have eight warps as a rule, and of those here only four are near.
    assert len(tried["_norm"]) == 6
    assert len(tried["_gated"]) == 4


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("d", "usual"), [(64, 1), (576, 4), (2048, 8), (8192, 16)])
def test_norms_have_a_warp_for_each_256_features_or_about_as_many(d, usual, many):
    configs = [triton.Config({}, num_warps=warps) for warps in (4, 1, 2, 8, 16, 32)]
    block = triton.next_power_of_2(d)
    found = blocks_triton._usual_warps(configs, {}, BLOCK=block, MANY=many)
    wanted = {usual // 2, usual, 2 * usual} - {0} if many else {usual}
    assert {config.num_warps for config in found} == wanted


def test_few_elements_are_not_measured(tried, monkeypatch):
    monkeypatch.setattr(blocks_triton, "is_many", is_many)
    test_a_norm_and_its_gradient((5, 300), torch.float32)
    test_a_gated_activation_and_its_gradients("silu", torch.float32)
    assert not any(tried.values())
