import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from covering import covering
from lorakit.kernels import fused, plain
from lorakit.kernels.choice import use
from lorakit.kernels.dropout import Dropout
from lorakit.kernels.fused import Factors, FactorUse, Span, add_updates, available

D_IN, D_OUT = 12, 10
ENTRIES = {
    "all": None,
    "a range": slice(2, 7),
    "interleaved": torch.tensor([8, 0, 3, 4]),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make several pieces of a few tokens."""
    monkeypatch.setattr(fused, "_PIECE", 3)


def numbers(use):
    """The output rows that an update changes."""
    return torch.arange(D_OUT)[slice(None) if use.entries is None else use.entries]


def reference(output, x, factors, spans):
    """The same from plain torch, one factor after the other, by autograd."""
    output, tokens = output.reshape(-1, D_OUT), x.reshape(-1, D_IN)
    for number, each in enumerate(factors):
        own = [t for s in spans if number in s.factors for t in range(s.start, s.stop)]
        use = each.use
        update = plain.linear_update(
            tokens[own], each.a, each.b, use.scale, dropout=use.dropout
        ).to(output.dtype)
        columns = numbers(use)
        wide = torch.zeros(len(own), D_OUT, dtype=output.dtype).index_copy(1, columns, update)
        output = output.index_add(0, torch.tensor(own, dtype=torch.int64), wide)
    return output


def gradients(function, output, x, factors, spans, *, of_x=True):
    """A function's output, and the gradients of the layer's output, of x, A and B."""
    leaves = [output.clone(), x.clone(), *(w.clone() for f in factors for w in (f.a, f.b))]
    for leaf in leaves:
        leaf.requires_grad_()
    leaves[1].requires_grad_(of_x)
    weights = [leaves[i : i + 2] for i in range(2, len(leaves), 2)]
    own = [Factors(a, b, f.use) for (a, b), f in zip(weights, factors, strict=True)]
    found = function(leaves[0] * 1, leaves[1], own, spans)
    (
        found.reshape(-1, D_OUT) * torch.linspace(-1, 1, D_OUT).to(found.dtype)
    ).square().sum().backward()
    return [found.detach().reshape(-1, D_OUT), *(leaf.grad for leaf in leaves)]


def check_equal(output, x, factors, spans, *, of_x=True):
    expected = gradients(reference, output, x, factors, spans, of_x=of_x)
    found = gradients(add_updates, output, x, factors, spans, of_x=of_x)
    precision = max((output.dtype, factors[0].a.dtype), key=lambda d: torch.finfo(d).eps)
    for ours, plains in zip(found, expected, strict=True):
        if plains is None:
            assert ours is None
            continue
        assert ours.dtype == plains.dtype
        size = plains.double().abs().max().item()
        torch.testing.assert_close(ours, plains, rtol=0, atol=TOLERANCE[precision] * max(size, 1))


def random_factors(draw, use, *, rank=3, dtype=torch.float64):
    width = len(numbers(use))
    a = torch.randn(rank, D_IN, generator=draw, dtype=torch.float64) / D_IN**0.5
    b = torch.randn(width, rank, generator=draw, dtype=torch.float64) / rank**0.5
    return Factors(a.to(dtype), b.to(dtype), use)


def inputs(draw, shape, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.randn(*shape, D_OUT, generator=draw, dtype=torch.float64)
    x = torch.randn(*shape, D_IN, generator=draw, dtype=torch.float64)
    return output.to(dtype), x.to(dtype)


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


@covering(
    ("of_base", "of_adapter", "entries", "dropout", "shape"),
    [
        (*dtypes, *others)
        for dtypes in DTYPES
        for others in itertools.product(
            ENTRIES.values(), [None, Dropout(0.3, 5)], [(7,), (2, 4), (2, 2, 2)]
        )
    ],
    each=5,
)
def test_outputs_and_gradients_equal_plain_torch(of_base, of_adapter, entries, dropout, shape):
    draw = torch.Generator().manual_seed(0)
    output, x = inputs(draw, shape, of_base)
    factors = [random_factors(draw, FactorUse(0.5, entries, dropout), dtype=of_adapter)]
    check_equal(output, x, factors, [Span(0, x.shape[:-1].numel(), (0,))])


uses = st.builds(
    FactorUse,
    scale=st.sampled_from([1.0, -0.3, 2.0]),
    entries=st.sampled_from(list(ENTRIES.values())),
    dropout=st.none() | st.builds(Dropout, st.sampled_from([0.1, 0.9]), st.integers(0, 9)),
)


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 99), of_x=st.booleans())
def test_any_factors_on_any_tokens_equal_plain_torch(data, seed, of_x):
    draw = torch.Generator().manual_seed(seed)
    factors = [
        random_factors(draw, use, rank=data.draw(st.integers(1, 64)))
        for use in data.draw(st.lists(uses, min_size=1, max_size=4))
    ]
    tokens = data.draw(st.integers(1, 9))
    ends = sorted(data.draw(st.sets(st.integers(0, tokens), min_size=2, max_size=6)))
    spans = [
        Span(
            start, stop, tuple(data.draw(st.sets(st.sampled_from(range(len(factors))), min_size=1)))
        )
        for start, stop in itertools.pairwise(ends)
    ]
    check_equal(*inputs(draw, (tokens,)), factors, spans, of_x=of_x)


def test_gradients_are_those_of_finite_differences():
    draw = torch.Generator().manual_seed(0)
    output, x = inputs(draw, (5,))
    both = [
        random_factors(draw, FactorUse(0.5, ENTRIES["a range"], Dropout(0.3, 1))),
        random_factors(draw, FactorUse(2.0, ENTRIES["interleaved"])),
    ]
    spans = [Span(0, 2, (0, 1)), Span(3, 5, (1,))]

    def function(output, x, *weights):
        pairs = zip(weights[::2], weights[1::2], both, strict=True)
        factors = [Factors(a, b, each.use) for a, b, each in pairs]
        return add_updates(output * 1, x, factors, spans)

    leaves = [output, x, *(w for each in both for w in (each.a, each.b))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_tokens_outside_of_the_spans_keep_every_bit():
    draw = torch.Generator().manual_seed(0)
    output, x = inputs(draw, (5,), torch.bfloat16)
    output[0] = -0.0
    before = output.clone()
    add_updates(output, x, [random_factors(draw, FactorUse(1.0, None))], [Span(1, 3, (0,))])
    outside = [0, 3, 4]
    assert torch.equal(output[outside], before[outside])
    assert torch.signbit(output[0]).all()
    assert not (output[1:3] == before[1:3]).all()


@pytest.mark.parametrize("bias", [True, False])  # With a bias the result is a view.
def test_a_frozen_layers_output_is_overwritten_only_where_autograd_has_no_view_of_it(bias):
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(D_IN, D_OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    factors, spans = [random_factors(draw, FactorUse(1.0, None))], [Span(0, 6, (0,))]
    output = layer(x)
    before, is_view = output.detach().clone(), output._is_view()
    changed = add_updates(output, x, factors, spans)
    assert torch.equal(output.detach(), before) == is_view
    changed.square().sum().backward()
    found, x.grad = x.grad, None
    reference(layer(x), x, factors, spans).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_what_was_written_into_since_is_noticed():
    draw = torch.Generator().manual_seed(0)
    output, x = inputs(draw, (5,))
    factors = [random_factors(draw, FactorUse(1.0, None))]
    factors[0].a.requires_grad_()
    found = add_updates(output, x, factors, [Span(0, 5, (0,))])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_differentiating_twice_is_a_clear_error():
    draw = torch.Generator().manual_seed(0)
    output, x = inputs(draw, (5,))
    factors = [random_factors(draw, FactorUse(1.0, None))]
    x.requires_grad_()
    found = add_updates(output, x, factors, [Span(0, 5, (0,))]).square().sum()
    (gradient,) = torch.autograd.grad(found, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def saved_by(function):
    """The tensors that autograd saves for a backward pass, each memory once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return list(kept.values()), result


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 5)], ids=["all", "dropout"])
def test_only_the_input_itself_and_its_product_with_a_are_kept(dropout):
    draw = torch.Generator().manual_seed(0)
    output, x = inputs(draw, (5,), torch.bfloat16)
    factors = [random_factors(draw, FactorUse(1.0, None, dropout), dtype=torch.float32)]
    a, b = (w.requires_grad_() for w in (factors[0].a, factors[0].b))
    kept, _ = saved_by(lambda: add_updates(output, x, factors, [Span(0, 5, (0,))]))
    assert {id(tensor) for tensor in kept} >= {id(x)}
    others = [tensor for tensor in kept if all(tensor is not own for own in (x, a, b))]
    assert [tuple(tensor.shape) for tensor in others] == [(3, 5)]


def test_the_input_is_not_kept_where_no_a_is_trained():
    draw = torch.Generator().manual_seed(0)
    output, x = inputs(draw, (5,))
    factors = [random_factors(draw, FactorUse(1.0, None))]
    factors[0].b.requires_grad_()
    kept, found = saved_by(lambda: add_updates(output, x, factors, [Span(0, 5, (0,))]))
    assert all(tensor is not x for tensor in kept)
    found.sum().backward()
    assert factors[0].a.grad is None
    assert factors[0].b.grad is not None


def test_it_is_for_training_and_gives_way_to_plain_torch():
    x = torch.ones(2)
    assert available(x, training=False)
    with torch.no_grad():
        assert available(x, training=True)
        assert not available(x, training=False)
    with use("plain"):
        assert not available(x, training=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not available(x, training=True)
    inside = torch.func.vmap(lambda x: x * available(x, training=True))(torch.ones(2))
    assert not inside.any()
