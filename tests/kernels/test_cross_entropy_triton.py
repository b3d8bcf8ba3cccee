import pytest
import torch
from torch import nn

from kernels.triton_process import needs_gpu, run_checks
from lorakit.kernels.cross_entropy import head_cross_entropy

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    # Triton 3.9 warns while this is not set.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.gpu
@needs_gpu
def test_the_kernel_keeps_its_promises_on_the_device():
    run_checks("cross_entropy_checks.py", TRITON_INTERPRET="0")


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


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakit.kernels.cross_entropy_triton import _cross_entropy

kernel = _cross_entropy.fn
names = kernel.arg_names
pointers = dict.fromkeys(["losses", "weights", "smoothings", "z_losses"], "*fp32")
pointers |= {"answer": "*bf16", "gradient": "*bf16", "targets": "*i64"}
for choice in (True, False):
    constants = {"SMOOTHS": choice, "HAS_Z": choice, "WANTS_GRADIENT": True, "BLOCK": 8192}
    constants |= {"SCALE": 0.5, "CAP": 30.0 if choice else 0.0, "MANY": choice}
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    source = ASTSource(kernel, signature, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm
"""


def test_the_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path, forks):
    # The interpreter accepts what the compiler may not: a variable that changes its type.
    forks.run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
