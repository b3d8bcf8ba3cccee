import importlib

import pytest
import torch

from kernels.mixed_batches import USES
from kernels.triton_process import needs_gpu, run_checks
from lorakit.kernels.grouped import down_project, gather, up_project_onto
from lorakit.kernels.grouping import group_rows

triton = pytest.importorskip("triton", reason="Triton is not installed")
segments_triton = importlib.import_module("lorakit.kernels.segments_triton")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    # Triton 3.9 warns while this is not set.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_keep_their_promises_on_the_device():
    run_checks("segments_checks.py", TRITON_INTERPRET="0")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_wide_layers_agree_with_plain_torch_on_the_device(x_dtype, dtype, length):
    draw = torch.Generator("cuda").manual_seed(0)

    def random(*size, dtype):
        return torch.randn(size, generator=draw, device="cuda").mul_(0.1).to(dtype).requires_grad_()

    a, b = random(4, 24, 512, dtype=dtype), random(4, 24, 384, dtype=dtype)
    coarsest = max(torch.finfo(kind).eps for kind in (x_dtype, dtype))
    for index_of_row in USES.values():
        x = random(len(index_of_row), length, 512, dtype=x_dtype)
        output = random(len(index_of_row), length, 384, dtype=x_dtype)
        results = []
        for kernels in ("auto", "plain"):
            grouping = group_rows(index_of_row, device="cuda", dtype=dtype, kernels=kernels)
            h = down_project(x, gather(a, grouping), grouping)
            found = up_project_onto(output * 1, h, gather(b, grouping), grouping)
            results.append([found, *torch.autograd.grad(found.float().square().sum(), (x, a, b))])
        for ours, plain in zip(*results, strict=True):
            assert ours.dtype == plain.dtype
            largest = max(plain.abs().max().item(), 1e-3)
            bound = max(4 * coarsest, 1e-5) * largest
            torch.testing.assert_close(ours, plain, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "widest"),
    [(16, 16, 4096, 128), (16, 16, 20, 32), (16, 16, 3, 16), (16, 128, 4096, 64), (64, 64, 99, 32)],
)
def test_only_tiles_that_fit_are_tried(tokens, d_in, d_out, widest):
    configs = [triton.Config({"BLOCK_OUT": size}) for size in (32, 16, 64, 128)]
    constants = {"BLOCK_TOKENS": tokens, "BLOCK_IN": d_in, "ADD": True}
    found = segments_triton._sensible(configs, {"d_out": d_out}, **constants)
    assert max(config.kwargs["BLOCK_OUT"] for config in found) == widest
    assert 16 in [config.kwargs["BLOCK_OUT"] for config in found]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakit.kernels import segments_triton

def compile(kernel, types, constants):
    names = kernel.fn.arg_names
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in names}
    source = ASTSource(kernel.fn, signature, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm

tables = dict.fromkeys(["rows", "adapters", "starts", "stops", "bounds"], "*i32")
compile(
    segments_triton._rows_times_matrix,
    {**tables, "x": "*bf16", "w": "*fp32", "out": "*bf16"},
    {"ADD": True, "PRECISION": "ieee", "BLOCK_TOKENS": 16, "BLOCK_IN": 16, "BLOCK_OUT": 16},
)
compile(
    segments_triton._outer_products,
    {**tables, "h": "*fp16", "y": "*bf16", "out": "*fp16"},
    {"PRECISION": "ieee", "BLOCK_TOKENS": 32, "BLOCK_RANK": 16, "BLOCK_OUT": 32},
)
"""


@pytest.mark.thorough
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path, forks):
    # The interpreter accepts what the compiler may not: shapes of products, mixed types.
    forks.run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
