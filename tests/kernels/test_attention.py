"""Attention within packed sequences of any number and length, beside ten naive lines."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.kernels.attention import (
    LONGEST,
    AttentionRule,
    MatmulAttention,
    fused_attention,
    packed_attention,
)
from lorakit.kernels.custom_op_attention import custom_op_attention, in_force
from lorakit.kernels.packed_sequences import FEW_SIZES, LARGEST_LENGTH_RATIO, PackedSequences

RULES = {
    "causal": AttentionRule(scale=0.4),
    "both sides": AttentionRule(scale=0.4, causal=False),
    "window": AttentionRule(scale=0.4, window=3),
    "softcap": AttentionRule(scale=2.0, softcap=0.7),
    "window and softcap": AttentionRule(scale=2.0, softcap=0.7, window=2),
    "sinks and window": AttentionRule(
        scale=0.4, sinks=torch.linspace(-1, 2, 6, dtype=torch.float64), window=3
    ),
}
ROWS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3)


def sequences_of(rows, *, padding=0):
    return PackedSequences(tuple(map(tuple, rows)), max(map(sum, rows)) + padding)


def inputs(packed, *, heads=(6, 2), dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as layers make them: heads side by side in memory."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], 4), (heads[1], 4), (heads[1], 5))
    q, k, v = (
        torch.randn(len(packed.lengths), packed.width, *size, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for size in sizes
    )
    return q, k, v


def naive(q, k, v, packed, rule):
    """Attention, one packed sequence after the other."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    for row, lengths in enumerate(packed.lengths):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        for own in (slice(end - n, end) for n, end in zip(lengths, ends, strict=True)):
            scores = q[row, :, own] @ k[row, :, own].transpose(1, 2) * rule.scale
            if rule.softcap:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            back = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
            hidden = (back < 0) | (back >= (rule.window or 99))
            scores = scores.masked_fill(hidden & torch.tensor(rule.causal), -torch.inf)
            if rule.sinks is not None:
                column = rule.sinks[:, None, None].expand(-1, len(back), 1)
                scores = torch.cat([scores, column], -1)
            out[row, own] = (scores.softmax(-1)[..., : len(back)] @ v[row, :, own]).transpose(0, 1)
    return out


def check(attend, packed, rule, *, heads=(6, 2)):
    tensors = inputs(packed, heads=heads)
    expected = naive(*tensors, packed, rule)
    found = attend(*tensors, packed, rule)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    outer = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = torch.autograd.grad(found, tensors, outer)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, tensors, outer), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@given(rows=ROWS, padding=st.integers(0, 4))
@settings(max_examples=15)
def test_matmuls_equal_naive_attention(rule, rows, padding):
    check(packed_attention, sequences_of(rows, padding=padding), RULES[rule])


@pytest.mark.parametrize("rule", ["causal", "both sides", "window"])
@given(rows=ROWS, padding=st.integers(0, 4))
@settings(max_examples=10)
def test_fused_attention_equals_naive_attention(rule, rows, padding):
    check(fused_attention, sequences_of(rows, padding=padding), RULES[rule])


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1)])
def test_any_number_of_heads_may_share_keys(heads):
    check(packed_attention, sequences_of([[5, 1, 3], [7]]), RULES["causal"], heads=heads)


def test_long_sequences_take_the_fused_kernel_and_short_ones_do_not():
    for length, is_matmul in ((LONGEST, True), (LONGEST + 1, False)):
        packed = PackedSequences(((length,),), length)
        out = packed_attention(*inputs(packed, heads=(1, 1)), packed, AttentionRule(scale=0.4))
        assert ("MatmulAttention" in type(out.grad_fn).__name__) == is_matmul


# In `make test`: the two that have among them all that a rule can say.
SAID = ("both sides", "window and softcap")


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=() if r in SAID else pytest.mark.thorough) for r in RULES]
)
@pytest.mark.thorough
def test_gradients_are_exact_with_dropout_too(rule):
    packed = sequences_of([[3], [1, 2]], padding=1)
    with_dropout = dataclasses.replace(RULES[rule], dropout=0.4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: MatmulAttention.apply(q, k, v, packed, with_dropout, 5),
        inputs(packed, heads=(6, 2)),
    )


def test_dropout_drops_its_share_and_keeps_the_mean():
    packed = sequences_of([[40, 40]])
    q, k, v = inputs(packed)
    flat = torch.zeros_like(q), torch.zeros_like(k), torch.ones_like(v)
    torch.manual_seed(0)
    out = packed_attention(*flat, packed, AttentionRule(scale=1.0, causal=False, dropout=0.25))
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    # Of 40 probabilities of 1/40 a binomial number stays.
    assert out.var().item() == pytest.approx(0.25 / 0.75 / 40, rel=0.2)
    again = packed_attention(*flat, packed, AttentionRule(scale=1.0, causal=False, dropout=0.25))
    assert not torch.equal(out, again)


@pytest.mark.parametrize("attend", [packed_attention, fused_attention])
def test_a_sequence_does_not_feel_what_others_are_or_whether_they_are_numbers(attend):
    packed = sequences_of([[5, 4, 6], [3, 3]], padding=2)
    before, spoilt = (inputs(packed, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for tensor in spoilt:
            tensor[0, :, 5:9] = torch.nan
    outs = [attend(*each, packed, RULES["causal"]) for each in (before, spoilt)]
    assert outs[1][0, 5:9].isnan().all()
    others = torch.ones(2, packed.width, dtype=torch.bool)
    others[0, 5:9] = False
    assert torch.equal(outs[0][others], outs[1][others])
    gradients = [
        torch.autograd.grad(out[others].sum(), t)
        for out, t in zip(outs, (before, spoilt), strict=True)
    ]
    for clean, found in zip(*gradients, strict=True):
        assert torch.equal(*(g.transpose(1, 2)[others] for g in (clean, found)))


def test_padding_gets_zeros_and_gives_no_gradient():
    packed = sequences_of([[4], [2, 3]], padding=3)
    tensors = inputs(packed)
    out = packed_attention(*tensors, packed, RULES["causal"])
    out.sum().backward()
    for row, used in ((0, 4), (1, 5)):
        assert not out[row, used:].any()
        assert out[row, :used].all()
        for tensor in tensors:
            assert tensor.grad is not None
            assert not tensor.grad[row, :, used:].any()


def test_only_q_k_and_v_wait_for_the_backward_pass():
    packed = sequences_of([[30, 30]])
    tensors = inputs(packed)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_attention(*tensors, packed, RULES["causal"])
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype):
    packed = sequences_of([[9, 12, 1]])
    tensors = inputs(packed)
    expected = naive(*tensors, packed, RULES["causal"])
    q, k, v = (t.to(dtype) for t in tensors)
    found = packed_attention(q, k, v, packed, RULES["causal"])
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max()
    assert error < 4 * torch.finfo(dtype).eps * expected.abs().max()


@given(rows=ROWS)
@settings(max_examples=20)
def test_groups_hold_every_sequence_once_and_only_those_of_like_length(rows):
    packed = sequences_of(rows)
    groups = packed.groups(torch.device("cpu"))
    tokens = torch.cat([group.tokens[group.real] for group in groups])
    expected = [r * packed.width + t for r, row in enumerate(rows) for t in range(sum(row))]
    assert sorted(tokens.tolist()) == expected
    for group in groups:
        lengths = group.real.sum(1)
        assert int(lengths.max()) <= LARGEST_LENGTH_RATIO * int(lengths.min())
        assert group.longest % FEW_SIZES == 0
        assert group.longest < int(lengths.max()) + FEW_SIZES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_attention_on_a_gpu_equals_naive_attention(rule):
    packed = sequences_of([[5, 1, 30], [12]], padding=2)
    tensors = inputs(packed)
    q, k, v = (t.cuda() for t in tensors)
    found = packed_attention(q, k, v, packed, RULES[rule])
    torch.testing.assert_close(found.cpu(), naive(*tensors, packed, RULES[rule]))


@pytest.fixture
def custom_op():
    """Attention through the custom op, which a compiler does not trace."""

    def attend(q, k, v, packed, rule):
        in_force[-1] = packed
        return custom_op_attention(q, k, v, -1, rule)

    yield attend
    in_force.pop(-1, None)


@pytest.mark.parametrize("rule", RULES)
def test_the_custom_op_gives_the_same_and_its_gradients(custom_op, rule):
    check(custom_op, sequences_of([[5, 1, 3], [7]], padding=2), RULES[rule])


def test_the_custom_op_drops_the_same_forwards_and_backwards(custom_op):
    packed = sequences_of([[4, 3]])
    q, k, v = inputs(packed, heads=(2, 2))
    rule = AttentionRule(scale=0.4, dropout=0.5)

    def drop(v):
        torch.manual_seed(3)
        return custom_op(q, k, v, packed, rule)

    outer = torch.randn(drop(v).shape, dtype=v.dtype)
    (slope,) = torch.autograd.grad(drop(v), v, outer)
    # What comes out is linear in v, if the same probabilities are dropped.
    torch.testing.assert_close((slope * v).sum(), (drop(v) * outer).sum())
    torch.manual_seed(4)
    assert not torch.equal(custom_op(q, k, v, packed, rule), drop(v))


def test_the_custom_op_refuses_a_batch_of_another_size(custom_op):
    tensors = inputs(sequences_of([[4, 3]]))
    with pytest.raises(ModelError, match=r"1×7 tokens and keys of 7 .* of 1×9"):
        custom_op(*tensors, sequences_of([[4, 5]]), RULES["causal"])
