import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.mixed_batches import ADAPTERS, D_OUT, RANK, USES, expected, grouped_update, mixed_batch
from lorakit.errors import RouteError
from lorakit.kernels.grouped import (
    add_update,
    down_project,
    gather,
    up_project,
    up_project_onto,
)
from lorakit.kernels.grouping import group_rows

SHAPES = {"2-D": (1, ()), "3-D": (1, (3,)), "4-D": (1, (2, 3)), "beams": (2, (3,)), "flat": (3, ())}


def answer(batch, index_of_row, **options):
    """The output with the update added to a copy of it."""
    grouping = group_rows(index_of_row, dtype=batch.a.dtype, **options)
    h = down_project(batch.x, gather(batch.a, grouping), grouping)
    return up_project_onto(batch.output.clone(), h, gather(batch.b, grouping), grouping)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("k", "shape"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("index_of_row", USES.values(), ids=USES)
def test_each_row_gets_the_update_of_its_own_adapter(index_of_row, k, shape, grad):
    batch = mixed_batch(len(index_of_row) * k, shape)
    with torch.set_grad_enabled(grad):
        found = answer(batch, index_of_row)
    torch.testing.assert_close(found.double(), expected(batch, index_of_row), rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(
    index_of_row=st.lists(st.integers(-1, ADAPTERS - 1), min_size=1, max_size=12),
    k=st.integers(1, 3),
    shape=st.lists(st.integers(1, 3), max_size=2),
    grad=st.booleans(),
)
def test_any_route_equals_the_loop_over_rows(index_of_row, k, shape, grad):
    batch = mixed_batch(len(index_of_row) * k, shape, x_dtype=torch.float64, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        found = answer(batch, index_of_row)
    torch.testing.assert_close(found, expected(batch, index_of_row), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index_of_row", USES.values(), ids=USES)
def test_gradients_are_right(index_of_row):
    batch = mixed_batch(len(index_of_row), (2,), x_dtype=torch.float64, dtype=torch.float64)
    grouping = group_rows(index_of_row, dtype=torch.float64)

    def function(x, output, a, b):
        h = down_project(x, gather(a, grouping), grouping)
        return up_project_onto(output * 1, h, gather(b, grouping), grouping)

    inputs = [part.requires_grad_() for part in batch.parts()]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_layers_that_share_an_input_share_one_narrow():
    index_of_row = USES["some base rows"]
    first, second = (mixed_batch(len(index_of_row), (3,), seed=seed) for seed in (0, 1))
    grouping = group_rows(index_of_row)
    h = down_project(first.x, gather(torch.cat([first.a, second.a], 1), grouping), grouping)
    for batch, part in ((first, h[..., :RANK]), (second, h[..., RANK:])):
        batch.x = first.x
        found = up_project_onto(batch.output.clone(), part, gather(batch.b, grouping), grouping)
        wanted = expected(batch, index_of_row)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index_of_row", [USES["some base rows"], USES["sorted"]])
@pytest.mark.parametrize("grad", [True, False])
def test_a_slice_of_an_output_is_changed_in_place(index_of_row, grad):
    batch = mixed_batch(len(index_of_row), (3,))
    wide = torch.cat([batch.output, batch.output], -1)
    grouping = group_rows(index_of_row)
    with torch.set_grad_enabled(grad):
        h = down_project(batch.x, gather(batch.a, grouping), grouping)
        up_project_onto(wide[..., D_OUT:], h, gather(batch.b, grouping), grouping)
    assert torch.equal(wide[..., :D_OUT], batch.output)
    wanted = expected(batch, index_of_row)
    torch.testing.assert_close(wide[..., D_OUT:].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("index_of_row", [USES["some base rows"], USES["distinct"]])
def test_a_bfloat16_output_is_as_near_as_its_precision_allows(index_of_row, tokens):
    batch = mixed_batch(len(index_of_row), (tokens,), x_dtype=torch.bfloat16)
    with torch.no_grad():
        found = answer(batch, index_of_row)
    # With gradients everything is in float32.
    update, terms = torch.zeros(2, *batch.output.shape)
    rows = [row for row, adapter in enumerate(index_of_row) if adapter >= 0]
    of_rows = group_rows(index_of_row)
    update[rows] = grouped_update(batch.x, batch.a, batch.b, of_rows).detach()
    terms[rows] = grouped_update(batch.x.abs(), batch.a.abs(), batch.b.abs(), of_rows).detach()
    assert found.dtype == torch.bfloat16
    # Half a step of the sum, and of A, h, B and the update, whose terms may cancel.
    exact = batch.output.float() + update
    allowed = exact.abs() * 2**-8 + 4 * terms * 2**-9
    assert ((found.float() - exact).abs() <= allowed).all()
    assert torch.equal(found[update == 0], batch.output[update == 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_rows_keep_every_bit(dtype):
    index_of_row = USES["some base rows"]
    batch = mixed_batch(len(index_of_row), (3,), x_dtype=dtype)
    base = torch.tensor(index_of_row) < 0
    batch.output[base] = -0.0  # which 0.0 + -0.0 is not
    found = answer(batch, index_of_row)
    assert torch.signbit(found[base]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("index_of_row", USES.values(), ids=USES)
def test_a_bad_adapter_harms_only_its_own_rows(index_of_row, value):
    batch = mixed_batch(len(index_of_row), (3,))
    clean = answer(batch, index_of_row)
    batch.a[3] = value
    batch.b[3] = value
    found = answer(batch, index_of_row)
    bad = torch.tensor(index_of_row) == 3
    assert torch.equal(found[~bad], clean[~bad])
    assert not torch.isfinite(found[bad]).any()


@pytest.mark.parametrize("index_of_row", USES.values(), ids=USES)
def test_a_bad_row_harms_only_its_own_adapters_gradient(index_of_row):
    batch = mixed_batch(len(index_of_row), (3,))
    batch.x[-1] = float("nan")
    batch.a.requires_grad_()
    found = answer(batch, index_of_row)
    assert torch.isnan(found[-1]).any() == (index_of_row[-1] >= 0)
    found.sum().backward()
    assert batch.a.grad is not None
    for adapter in set(range(ADAPTERS)) - {index_of_row[-1]}:
        assert torch.isfinite(batch.a.grad[adapter]).all()


def test_an_update_can_be_added_later():
    index_of_row = USES["skewed"]
    batch = mixed_batch(len(index_of_row) * 2, (3,))
    grouping = group_rows(index_of_row)
    h = down_project(batch.x, gather(batch.a, grouping), grouping)
    update = up_project(h, gather(batch.b, grouping), grouping)
    found = add_update(batch.output.clone(), update, grouping)
    torch.testing.assert_close(found.double(), expected(batch, index_of_row), rtol=1e-5, atol=1e-5)


def test_the_weights_of_adapters_in_order_are_not_copied():
    stack = torch.randn(ADAPTERS, RANK, 3)
    assert gather(stack, group_rows([0, 0, 1, 1])).data_ptr() == stack.data_ptr()


def test_a_route_of_the_wrong_length_is_an_error():
    batch = mixed_batch(5)
    with pytest.raises(RouteError, match="for 2 rows, but the batch has 5"):
        grouped_update(batch.x, batch.a, batch.b, group_rows([0, 1]))
