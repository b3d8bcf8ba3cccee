"""Attention within packed sequences: softmax(scale·q·kᵀ)·v of each by itself, and its gradients.

There are two implementations. One is plain batched matmuls, which keep only q, k and v for the
backward pass and recompute the probabilities. The other is torch's fused attention, which never
stores probabilities. On CPUs the matmuls take half the time of the fused kernel for short
sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.packed_sequences import PackedSequences, Vectors
from lorakit.kernels.stand_in import kind_of_device, seeded
from lorakit.upstream.private_names import softmax_gradient

LONGEST_IN_HALF_PRECISION, LONGEST = 512, 128
"""Tokens of a sequence up to which CPUs use matmuls; for longer ones the fused kernel is faster."""


@dataclass(frozen=True, kw_only=True)
class AttentionRule:
    """Which keys a query sees, and how scores become probabilities."""

    scale: float
    """Factor on q·k."""
    causal: bool = True
    """A token does not see those after it."""
    window: int | None = None
    """With `causal`: it sees at most so many tokens, itself included."""
    softcap: float | None = None
    """Scores s become softcap·tanh(s / softcap) (Gemma 2)."""
    sinks: Float[Tensor, " heads"] | None = None
    """A score of each query head for a key that is not there (gpt-oss): what it gets of the
    probabilities goes to no value. Not trained."""
    dropout: float = 0.0
    """Probability that an attention weight is set to 0; the others are divided by 1 - dropout."""


def packed_attention(
    q: Float[Tensor, "rows heads width d"],
    k: Float[Tensor, "rows kv_heads width d"],
    v: Float[Tensor, "rows kv_heads width d_v"],
    packed: PackedSequences,
    rule: AttentionRule,
) -> Float[Tensor, "rows width heads d_v"]:
    """Attention within each packed sequence; zero for padding.

    Consecutive heads of q share a head of k and v. Matmuls have the precision of the inputs;
    softmax is computed in float32, or in float64 for inputs of that precision.
    """
    most = LONGEST_IN_HALF_PRECISION if q.dtype.itemsize == 2 else LONGEST
    plain = rule.softcap is None and rule.sinks is None
    if plain and (kind_of_device(q) == "cuda" or packed.longest > most):
        return fused_attention(q, k, v, packed, rule)
    seed = int(torch.randint(2**62, ())) if rule.dropout else 0
    return MatmulAttention.apply(q, k, v, packed, rule, seed)


def fused_attention(
    q: Float[Tensor, "rows heads width d"],
    k: Float[Tensor, "rows kv_heads width d"],
    v: Float[Tensor, "rows kv_heads width d_v"],
    packed: PackedSequences,
    rule: AttentionRule,
) -> Float[Tensor, "rows width heads d_v"]:
    """The same by torch's scaled_dot_product_attention, which has no soft cap and no sinks."""
    heads, kv_heads = q.shape[1], k.shape[1]
    tables = [_table(q), *(_table(x.repeat_interleave(heads // kv_heads, 1)) for x in (k, v))]
    out = _output_table(tables[0], tables[2].shape[-1], packed)
    for group in packed.groups(q.device):
        places = group.vectors(heads, 1, packed.places)
        shape = (heads, group.count, group.longest, -1)
        whole = rule.window is None or rule.window >= group.longest
        # A fused kernel is chosen only without a mask; places beyond an end come after all queries.
        causal = rule.causal and whole
        mask = None if causal else group.mask(q.dtype, causal=rule.causal, window=rule.window)
        query, key, value = (places.gather(t).view(shape).transpose(0, 1) for t in tables)
        values = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=rule.dropout,
            is_causal=causal,
            scale=rule.scale,
        )
        out = out.index_copy(0, places.target, values.transpose(0, 1).flatten(0, 2))
    return out[:-1].view(q.shape[0], q.shape[2], heads, -1)


class MatmulAttention(torch.autograd.Function):
    """Attention by batched matmuls; only q, k and v are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: PackedSequences,
        rule: AttentionRule,
        seed: int,
    ) -> Tensor:
        """Attention within each packed sequence, as `packed_attention`."""
        ctx.save_for_backward(q, k, v)
        ctx.how = (packed, rule, seed)
        return matmul_attention(q, k, v, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k and v."""
        found = matmul_gradients(gradient, *ctx.saved_tensors, *ctx.how)
        return (*(x.transpose(1, 2) for x in found), None, None, None)


def matmul_attention(
    q: Float[Tensor, "rows heads width d"],
    k: Float[Tensor, "rows kv_heads width d"],
    v: Float[Tensor, "rows kv_heads width d_v"],
    packed: PackedSequences,
    rule: AttentionRule,
    seed: int,
) -> Float[Tensor, "rows width heads d_v"]:
    """Attention within each packed sequence by batched matmuls; the seed determines the dropout."""
    tables = [_table(x) for x in (q, k, v)]
    out = _output_table(tables[0], v.shape[-1], packed)
    generator = seeded(q.device, seed)
    for step in _group_matmuls(tables, (q.shape[1], k.shape[1]), packed, rule):
        probabilities, _ = step.probabilities()
        if rule.dropout:
            probabilities.mul_(_dropout_factors(probabilities, rule.dropout, generator))
        step.queries.scatter(torch.bmm(probabilities, step.v), out)
    return out[:-1].view(q.shape[0], q.shape[2], q.shape[1], -1)


def matmul_gradients(
    gradient: Float[Tensor, "rows width heads d_v"],
    q: Float[Tensor, "rows heads width d"],
    k: Float[Tensor, "rows kv_heads width d"],
    v: Float[Tensor, "rows kv_heads width d_v"],
    packed: PackedSequences,
    rule: AttentionRule,
    seed: int,
) -> tuple[
    Float[Tensor, "rows width heads d"],
    Float[Tensor, "rows width kv_heads d"],
    Float[Tensor, "rows width kv_heads d_v"],
]:
    """The gradients of q, k and v, token by token, given that of `matmul_attention`'s output."""
    tables = [_table(x) for x in (q, k, v)]
    output_gradient = gradient.reshape(-1, v.shape[-1])
    found = [_output_table(table, table.shape[-1], packed) for table in tables]
    generator = seeded(q.device, seed)
    for step in _group_matmuls(tables, (q.shape[1], k.shape[1]), packed, rule):
        of_q, of_k, of_v = step.gradients(step.queries.gather_or_zero(output_gradient), generator)
        step.queries.scatter(of_q, found[0])
        step.keys.scatter(of_k, found[1])
        step.keys.scatter(of_v, found[2])
    of_q, of_k, of_v = (
        into[:-1].view(x.transpose(1, 2).shape) for into, x in zip(found, (q, k, v), strict=True)
    )
    return of_q, of_k, of_v


@dataclass(frozen=True)
class _GroupMatmuls:
    """The matmuls of one group of sequences, with query heads that share k and v side by side."""

    queries: Vectors
    keys: Vectors
    q: Float[Tensor, "matmuls queries d"]
    k: Float[Tensor, "matmuls keys d"]
    v: Float[Tensor, "matmuls keys d_v"]
    mask: Tensor | None
    scores: tuple[int, ...]
    """(heads of k and v, sequences, query heads of each, longest, longest)."""
    rule: AttentionRule

    def probabilities(self) -> tuple[Tensor, Tensor | None]:
        """Softmax of the scores, and tanh(s / softcap) where there is a soft cap."""
        scores = torch.bmm(self.q, self.k.transpose(1, 2)).mul_(self.rule.scale)
        tanh = None
        if self.rule.softcap is not None:
            tanh = scores.div_(self.rule.softcap).tanh_()
            scores = tanh * self.rule.softcap
        if self.mask is not None:
            scores.view(self.scores).add_(self.mask)
        # In half precision, too, the kernel sums in float32.
        if self.rule.sinks is None:
            return torch.softmax(scores, -1), tanh
        heads, _, share, queries, _ = self.scores
        sinks = self.rule.sinks.to(scores.dtype).view(heads, 1, share, 1, 1)
        column = sinks.expand(*self.scores[:-1], 1).reshape(len(scores), share * queries, 1)
        # Without the last column, the gradient is that of a softmax whose last value counts zero.
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1].contiguous(), tanh

    def gradients(
        self, output_gradient: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, given the gradient of the output."""
        probabilities, tanh = self.probabilities()
        used, inner = probabilities, torch.bmm(output_gradient, self.v.transpose(1, 2))
        if self.rule.dropout:
            factors = _dropout_factors(probabilities, self.rule.dropout, generator)
            used, inner = probabilities * factors, inner.mul_(factors)
        of_v = torch.bmm(used.transpose(1, 2), output_gradient)
        inner = softmax_gradient(inner, probabilities)
        if tanh is not None:
            inner.mul_(1 - tanh * tanh)
        inner.mul_(self.rule.scale)
        return torch.bmm(inner, self.k), torch.bmm(inner.transpose(1, 2), self.q), of_v


def _table(x: Float[Tensor, "rows heads width d"]) -> Float[Tensor, "vectors d"]:
    """One vector per line: token by token, and head by head within a token."""
    return x.transpose(1, 2).reshape(-1, x.shape[-1])


def _output_table(table: Tensor, width: int, packed: PackedSequences) -> Tensor:
    """A table for as many vectors, and one more for positions beyond a sequence's end."""
    shape = (len(table) + 1, width)
    covered = packed.tokens == packed.places
    return table.new_empty(shape) if covered else table.new_zeros(shape)


def _dropout_factors(like: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """The factors of dropout; a generator in the same state gives the same ones."""
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _group_matmuls(
    tables: Sequence[Tensor], heads: tuple[int, int], packed: PackedSequences, rule: AttentionRule
) -> Iterator[_GroupMatmuls]:
    """Yield the matmuls of each group; `heads` is the number for q, and that for k and v."""
    (q, k, v), share = tables, heads[0] // heads[1]
    for group in packed.groups(q.device):
        queries, keys = (group.vectors(heads[1], each, packed.places) for each in (share, 1))
        yield _GroupMatmuls(
            queries=queries,
            keys=keys,
            q=queries.gather(q),
            k=keys.gather(k),
            v=keys.gather(v),
            mask=group.mask(q.dtype, causal=rule.causal, window=rule.window),
            scores=(heads[1], group.count, share, group.longest, group.longest),
            rule=rule,
        )
