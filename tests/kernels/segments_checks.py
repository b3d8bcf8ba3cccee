"""What the Triton kernels promise, on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1.

`test_interpreter.py` runs this file in a process of its own, and `test_segments_triton.py` does
on a GPU.
"""

import os

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.mixed_batches import ADAPTERS, D_OUT, RANK, USES, expected, grouped_update, mixed_batch
from lorakit.kernels import segments_triton
from lorakit.kernels.grouped import down_project, gather, up_project_onto
from lorakit.kernels.grouping import group_rows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BASES = USES["some base rows"]


def on_device(batch):
    for name, part in vars(batch).items():
        setattr(batch, name, part.to(DEVICE))
    return batch


def answer(parts, index_of_row, *, kernels="triton"):
    x, output, a, b = parts
    grouping = group_rows(index_of_row, device=DEVICE, dtype=a.dtype, kernels=kernels)
    h = down_project(x, gather(a, grouping), grouping)
    return up_project_onto(output.clone(), h, gather(b, grouping), grouping)


def gradients(batch, index_of_row, kernels):
    leaves = [part.detach().requires_grad_() for part in batch.parts()]
    found = answer(leaves, index_of_row, kernels=kernels)
    weights = torch.arange(found.numel(), device=DEVICE).view(found.shape).sin()
    return torch.autograd.grad((found * weights).sum(), leaves)


def near(found, wanted, tolerance=1e-5):
    """Whether two tensors differ by at most so much of the largest entry."""
    assert found.shape == wanted.shape
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    return torch.allclose(found.double(), wanted.double(), rtol=0, atol=tolerance * scale)


SOME = ("one row", "skewed", "some base rows", "base rows only")
"""The uses of adapters that `make test` tries in the interpreter."""


@pytest.mark.parametrize(
    "index_of_row",
    [
        pytest.param(rows, id=use, marks=() if use in SOME else pytest.mark.thorough)
        for use, rows in USES.items()
    ],
)
def test_values_and_gradients_are_those_of_plain_torch(index_of_row):
    batch = on_device(mixed_batch(len(index_of_row), (3,)))
    assert near(answer(batch.parts(), index_of_row), expected(batch, index_of_row))
    ours, plain = (gradients(batch, index_of_row, kernels) for kernels in ("triton", "plain"))
    assert all(near(*pair) for pair in zip(ours, plain, strict=True))


@settings(max_examples=10)
@given(
    index_of_row=st.lists(st.integers(-1, ADAPTERS - 1), min_size=1, max_size=8),
    k=st.integers(1, 2),
    shape=st.lists(st.integers(1, 3), max_size=1),
)
def test_any_route_equals_the_loop_over_rows(index_of_row, k, shape):
    batch = on_device(mixed_batch(len(index_of_row) * k, shape))
    assert near(answer(batch.parts(), index_of_row), expected(batch, index_of_row))


def test_more_tokens_than_a_segment_holds():
    index_of_row = [1, 0, 1, -1]
    batch = on_device(mixed_batch(4, (70,)))
    assert near(answer(batch.parts(), index_of_row), expected(batch, index_of_row))
    ours, plain = (gradients(batch, index_of_row, kernels) for kernels in ("triton", "plain"))
    assert all(near(*pair) for pair in zip(ours, plain, strict=True))


def test_ranks_and_features_wider_than_a_tile():
    draw = torch.Generator().manual_seed(0)
    sizes = ((3, 150), (3, 140), (2, 70, 150), (2, 70, 140))
    x, output, a, b = (torch.randn(size, generator=draw).to(DEVICE) for size in sizes)
    inputs = [part.requires_grad_() for part in (x, output, a / 12, b / 8)]
    results = [answer(inputs, [1, -1, 0], kernels=kernels) for kernels in ("triton", "plain")]
    assert near(*results)
    gradients = (torch.autograd.grad(result.square().sum(), inputs) for result in results)
    assert all(near(*pair) for pair in zip(*gradients, strict=True))


def test_layers_that_share_an_input_share_one_narrow():
    first, second = (on_device(mixed_batch(len(BASES), (3,), seed=seed)) for seed in (0, 1))
    grouping = group_rows(BASES, device=DEVICE, kernels="triton")
    h = down_project(first.x, torch.cat([first.a, second.a], 1), grouping)
    for batch, part in ((first, h[..., :RANK]), (second, h[..., RANK:])):
        batch.x = first.x
        found = up_project_onto(batch.output.clone(), part, batch.b, grouping)
        assert near(found, expected(batch, BASES))


def test_a_slice_of_an_output_is_changed_in_place():
    batch = on_device(mixed_batch(len(BASES), (3,)))
    batch.b.requires_grad_()
    wide = torch.cat([batch.output, batch.output], -1)
    grouping = group_rows(BASES, device=DEVICE, kernels="triton")
    up_project_onto(wide[..., D_OUT:], down_project(batch.x, batch.a, grouping), batch.b, grouping)
    assert torch.equal(wide[..., :D_OUT], batch.output)
    assert near(wide[..., D_OUT:].detach(), expected(batch, BASES))
    (found,) = torch.autograd.grad(wide.sum(), batch.b)
    (wanted,) = torch.autograd.grad(answer(batch.parts(), BASES, kernels="plain").sum(), batch.b)
    assert near(found, wanted)


@pytest.mark.parametrize(
    "x_dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.thorough), torch.float16]
)
def test_a_half_precision_base_with_float32_weights_is_rounded_once(x_dtype):
    batch = on_device(mixed_batch(len(BASES), (3,), x_dtype=x_dtype))
    found = answer(batch.parts(), BASES)
    assert found.dtype == x_dtype
    wanted = expected(batch, BASES)
    # Half a unit in the last place, and float32's own error where that decides the rounding. The
    # interpreter cuts bfloat16 off instead of rounding it.
    cut = x_dtype == torch.bfloat16 and DEVICE == "cpu"
    bound = wanted.abs() * torch.finfo(x_dtype).eps * (1 if cut else 0.5) + 1e-5
    assert ((found.double() - wanted).abs() <= bound).all()
    ours, plain = (gradients(batch, BASES, kernels) for kernels in ("triton", "plain"))
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == theirs.dtype
        assert near(mine, theirs, torch.finfo(mine.dtype).eps if mine.dtype == x_dtype else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter multiplies the bits of bfloat16 as integers")
    batch = on_device(mixed_batch(len(BASES), x_dtype=torch.bfloat16, dtype=dtype))
    found = answer(batch.parts(), BASES)
    assert found.dtype == torch.bfloat16
    assert near(found, expected(batch, BASES), 0.02)


def test_base_rows_keep_every_bit():
    batch = on_device(mixed_batch(len(BASES), (3,), x_dtype=torch.bfloat16))
    base = torch.tensor(BASES) < 0
    batch.output[base] = -0.0  # which 0.0 + -0.0 is not
    assert torch.signbit(answer(batch.parts(), BASES)[base]).all()


def test_a_bad_adapter_harms_only_its_own_rows():
    batch = on_device(mixed_batch(len(BASES), (3,)))
    clean = answer(batch.parts(), BASES)
    batch.a[3] = batch.b[3] = float("nan")
    found = answer(batch.parts(), BASES)
    bad = torch.tensor(BASES) == 3
    assert torch.equal(found[~bad], clean[~bad])
    assert torch.isnan(found[bad]).all()
    _, _, for_a, for_b = gradients(batch, BASES, "triton")
    assert torch.isfinite(for_a[:3]).all()
    assert torch.isfinite(for_b[:3]).all()


def test_bad_inputs_of_a_row_harm_only_its_own_adapters_gradient():
    batch = on_device(mixed_batch(len(BASES), (3,)))
    batch.x[BASES.index(3)] = float("nan")
    batch.x[BASES.index(-1)] = float("nan")
    _, _, for_a, for_b = gradients(batch, BASES, "triton")
    assert torch.isfinite(for_a[:3]).all()
    assert torch.isfinite(for_b[:3]).all()


def test_an_update_leaves_out_the_base_rows():
    batch = on_device(mixed_batch(len(BASES), (3,)))
    found, plain = (
        grouped_update(batch.x, batch.a, batch.b, group_rows(BASES, device=DEVICE, kernels=kernels))
        for kernels in ("triton", "plain")
    )
    assert near(found, plain)


def test_layers_of_one_route_share_one_table_of_segments():
    batch = on_device(mixed_batch(len(BASES), (3,)))
    grouping = group_rows(BASES, device=DEVICE, kernels="triton")
    before = segments_triton.token_blocks.cache_info().misses
    for _ in range(3):
        grouped_update(batch.x, batch.a, batch.b, grouping)
    assert segments_triton.token_blocks.cache_info().misses == before + 1


def test_trying_configurations_adds_the_update_once(monkeypatch):
    kernel = segments_triton._rows_times_matrix
    sizes = [triton.Config({"BLOCK_OUT": size}) for size in (16, 32)]
    tried = []

    def measure(call, quantiles):
        tried.append(call())
        return [1.0] * len(quantiles)

    monkeypatch.setattr(kernel, "configs", sizes)
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setitem(vars(kernel), "do_bench", measure)
    batch = on_device(mixed_batch(len(BASES), (3,)))
    assert near(answer(batch.parts(), BASES), expected(batch, BASES))
    assert len(tried) == 2  # Only B has more features than the narrower tile.
