import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.mixed_batches import USES
from lorakit.kernels.arrangement import arrange
from lorakit.kernels.grouped import gather, narrow, widen_onto

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device of compute capability 8")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    # Triton 3.9 warns while this is not set.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def run_checks(**environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x"]
    checks = Path(__file__).with_name("triton_checks.py")
    found = subprocess.run(
        [*command, str(checks)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout


def test_the_kernels_keep_their_promises_in_the_interpreter():
    run_checks(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_keep_their_promises_on_the_device():
    run_checks(TRITON_INTERPRET="0")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slot_of_row", USES.values(), ids=USES)
@pytest.mark.parametrize("length", [1, 100])
def test_wide_layers_agree_with_plain_torch_on_the_device(slot_of_row, length, x_dtype, dtype):
    torch.manual_seed(0)

    def random(*size, dtype):
        return torch.randn(size, device="cuda").mul_(0.1).to(dtype).requires_grad_()

    x = random(len(slot_of_row), length, 512, dtype=x_dtype)
    output = random(len(slot_of_row), length, 384, dtype=x_dtype)
    a, b = random(4, 24, 512, dtype=dtype), random(4, 24, 384, dtype=dtype)
    results = []
    for kernels in ("auto", "plain"):
        arrangement = arrange(slot_of_row, device="cuda", dtype=dtype, kernels=kernels)
        h = narrow(x, gather(a, arrangement), arrangement)
        found = widen_onto(output * 1, h, gather(b, arrangement), arrangement)
        results.append([found, *torch.autograd.grad(found.float().square().sum(), (x, a, b))])
    coarsest = max(torch.finfo(kind).eps for kind in (x_dtype, dtype))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        scale = plain.abs().max().item() if plain.numel() else 0.0
        bound = (4 * coarsest if coarsest > 1e-6 else 1e-5) * max(scale, 1e-3)
        torch.testing.assert_close(ours, plain, rtol=0, atol=bound)


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakit.kernels import segments_triton

def compile(kernel, types, constants):
    names = kernel.fn.arg_names
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in names}
    source = ASTSource(kernel.fn, signature, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm

tables = dict.fromkeys(["rows", "slots", "starts", "stops", "bounds"], "*i32")
for x, w in [("*bf16", "*fp32"), ("*fp16", "*fp16")]:
    compile(
        segments_triton._rows_times_matrix,
        {**tables, "x": x, "w": w, "out": x},
        {"ADD": True, "PRECISION": "ieee", "BLOCK_TOKENS": 16, "BLOCK_IN": 32, "BLOCK_OUT": 16},
    )
    compile(
        segments_triton._outer_products,
        {**tables, "h": w, "y": x, "out": w},
        {"PRECISION": "ieee", "BLOCK_TOKENS": 32, "BLOCK_RANK": 16, "BLOCK_OUT": 32},
    )
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    # The interpreter accepts what the compiler may not: shapes of products, mixed types.
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
