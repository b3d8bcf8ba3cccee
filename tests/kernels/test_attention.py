"""Attention within segments, beside ten naive lines, for segments of any number and length."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import ModelError
from lorakit.kernels.attention import (
    LONGEST,
    ProductAttention,
    Rule,
    fused_attention,
    segment_attention,
)
from lorakit.kernels.opaque_attention import in_force, opaque_attention
from lorakit.kernels.packed_rows import FEW_SIZES, LIKE, Segments

RULES = {
    "causal": Rule(scale=0.4),
    "both sides": Rule(scale=0.4, causal=False),
    "window": Rule(scale=0.4, window=3),
    "softcap": Rule(scale=2.0, softcap=0.7),
    "window and softcap": Rule(scale=2.0, softcap=0.7, window=2),
}
ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3)


def segments_of(rows, *, padding=0):
    return Segments(tuple(map(tuple, rows)), max(map(sum, rows)) + padding)


def inputs(segments, *, heads=(6, 2), dtype=torch.float64, seed=0):
    """Return q, k and v as layers make them: heads side by side in memory."""
    dice = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], 4), (heads[1], 4), (heads[1], 5))
    return [
        torch.randn(len(segments.lengths), segments.width, *size, generator=dice)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for size in sizes
    ]


def naive(q, k, v, segments, rule):
    """Return attention, one segment after the other."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    for row, lengths in enumerate(segments.lengths):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        for own in (slice(end - n, end) for n, end in zip(lengths, ends, strict=True)):
            scores = q[row, :, own] @ k[row, :, own].transpose(1, 2) * rule.scale
            if rule.softcap:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            back = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
            hidden = (back < 0) | (back >= (rule.window or 99))
            scores = scores.masked_fill(hidden & torch.tensor(rule.causal), -torch.inf)
            out[row, own] = (scores.softmax(-1) @ v[row, :, own]).transpose(0, 1)
    return out


def check(attend, segments, rule, *, heads=(6, 2)):
    tensors = inputs(segments, heads=heads)
    expected = naive(*tensors, segments, rule)
    found = attend(*tensors, segments, rule)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    outer = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = torch.autograd.grad(found, tensors, outer)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, tensors, outer), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@given(rows=ROWS, padding=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_products_equal_naive_attention(rule, rows, padding):
    check(segment_attention, segments_of(rows, padding=padding), RULES[rule])


@pytest.mark.parametrize("rule", ["causal", "both sides", "window"])
@given(rows=ROWS, padding=st.integers(0, 4))
@settings(max_examples=10, deadline=None)
def test_fused_attention_equals_naive_attention(rule, rows, padding):
    check(fused_attention, segments_of(rows, padding=padding), RULES[rule])


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1)])
def test_any_number_of_heads_may_share_keys(heads):
    check(segment_attention, segments_of([[5, 1, 3], [7]]), RULES["causal"], heads=heads)


def test_long_segments_take_the_fused_kernel_and_short_ones_do_not():
    for length, product in ((LONGEST, True), (LONGEST + 1, False)):
        segments = Segments(((length,),), length)
        out = segment_attention(*inputs(segments, heads=(1, 1)), segments, Rule(scale=0.4))
        assert ("ProductAttention" in type(out.grad_fn).__name__) == product


# In `make test`: the two that have among them all that a rule can say.
SAID = ("both sides", "window and softcap")


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=() if r in SAID else pytest.mark.thorough) for r in RULES]
)
def test_gradients_are_exact_with_dropout_too(rule):
    segments = segments_of([[3], [1, 2]], padding=1)
    with_dropout = dataclasses.replace(RULES[rule], dropout=0.4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: ProductAttention.apply(q, k, v, segments, with_dropout, 5),
        inputs(segments, heads=(2, 1)),
    )


def test_dropout_drops_its_share_and_keeps_the_mean():
    segments = segments_of([[40, 40]])
    q, k, v = inputs(segments)
    flat = torch.zeros_like(q), torch.zeros_like(k), torch.ones_like(v)
    torch.manual_seed(0)
    out = segment_attention(*flat, segments, Rule(scale=1.0, causal=False, dropout=0.25))
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    # Of 40 probabilities of 1/40 a binomial number stays.
    assert out.var().item() == pytest.approx(0.25 / 0.75 / 40, rel=0.2)
    again = segment_attention(*flat, segments, Rule(scale=1.0, causal=False, dropout=0.25))
    assert not torch.equal(out, again)


@pytest.mark.parametrize("attend", [segment_attention, fused_attention])
def test_a_segment_does_not_feel_what_others_are_or_whether_they_are_numbers(attend):
    segments = segments_of([[5, 4, 6], [3, 3]], padding=2)
    before, spoilt = (inputs(segments, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for tensor in spoilt:
            tensor[0, :, 5:9] = torch.nan
    outs = [attend(*each, segments, RULES["causal"]) for each in (before, spoilt)]
    assert outs[1][0, 5:9].isnan().all()
    others = torch.ones(2, segments.width, dtype=torch.bool)
    others[0, 5:9] = False
    assert torch.equal(outs[0][others], outs[1][others])
    gradients = [
        torch.autograd.grad(out[others].sum(), t)
        for out, t in zip(outs, (before, spoilt), strict=True)
    ]
    for clean, found in zip(*gradients, strict=True):
        assert torch.equal(*(g.transpose(1, 2)[others] for g in (clean, found)))


def test_padding_gets_zeros_and_gives_no_gradient():
    segments = segments_of([[4], [2, 3]], padding=3)
    tensors = inputs(segments)
    out = segment_attention(*tensors, segments, RULES["causal"])
    out.sum().backward()
    for row, used in ((0, 4), (1, 5)):
        assert not out[row, used:].any()
        assert out[row, :used].all()
        for tensor in tensors:
            assert not tensor.grad[row, :, used:].any()


def test_only_q_k_and_v_wait_for_the_backward_pass():
    segments = segments_of([[30, 30]])
    tensors = inputs(segments)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        segment_attention(*tensors, segments, RULES["causal"])
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype):
    segments = segments_of([[9, 12, 1]])
    tensors = inputs(segments)
    expected = naive(*tensors, segments, RULES["causal"])
    found = segment_attention(*(t.to(dtype) for t in tensors), segments, RULES["causal"])
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max()
    assert error < 4 * torch.finfo(dtype).eps * expected.abs().max()


@given(rows=ROWS)
@settings(max_examples=20, deadline=None)
def test_groups_hold_every_segment_once_and_only_those_of_like_length(rows):
    segments = segments_of(rows)
    groups = segments.groups(torch.device("cpu"))
    tokens = torch.cat([group.tokens[group.real] for group in groups])
    expected = [r * segments.width + t for r, row in enumerate(rows) for t in range(sum(row))]
    assert sorted(tokens.tolist()) == expected
    for group in groups:
        lengths = group.real.sum(1)
        assert int(lengths.max()) <= LIKE * int(lengths.min())
        assert group.longest % FEW_SIZES == 0
        assert group.longest < int(lengths.max()) + FEW_SIZES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_attention_on_a_gpu_equals_naive_attention(rule):
    segments = segments_of([[5, 1, 30], [12]], padding=2)
    tensors = inputs(segments)
    found = segment_attention(*(t.cuda() for t in tensors), segments, RULES[rule])
    torch.testing.assert_close(found.cpu(), naive(*tensors, segments, RULES[rule]))


@pytest.fixture
def opaque():
    """Return attention through the operation that a compiler does not look into."""

    def attend(q, k, v, segments, rule):
        in_force[-1] = segments
        return opaque_attention(q, k, v, -1, rule)

    yield attend
    in_force.pop(-1, None)


@pytest.mark.parametrize("rule", RULES)
def test_the_opaque_operation_gives_the_same_and_its_gradients(opaque, rule):
    check(opaque, segments_of([[5, 1, 3], [7]], padding=2), RULES[rule])


def test_the_opaque_operation_drops_the_same_forwards_and_backwards(opaque):
    segments = segments_of([[4, 3]])
    q, k, v = inputs(segments, heads=(2, 2))
    rule = Rule(scale=0.4, dropout=0.5)

    def drop(v):
        torch.manual_seed(3)
        return opaque(q, k, v, segments, rule)

    outer = torch.randn(drop(v).shape, dtype=v.dtype)
    (slope,) = torch.autograd.grad(drop(v), v, outer)
    # What comes out is linear in v, if the same probabilities are dropped.
    torch.testing.assert_close((slope * v).sum(), (drop(v) * outer).sum())
    torch.manual_seed(4)
    assert not torch.equal(opaque(q, k, v, segments, rule), drop(v))


def test_the_opaque_operation_refuses_a_batch_of_another_size(opaque):
    tensors = inputs(segments_of([[4, 3]]))
    with pytest.raises(ModelError, match=r"1×7 tokens and keys of 7 .* of 1×9"):
        opaque(*tensors, segments_of([[4, 5]]), RULES["causal"])
