"""Attention within segments as one operation, which torch.compile calls and does not look into.

Seen from inside, the segments of a batch would be part of the compiled code: another code for each
batch. The operation is told a number, under which it finds them when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.kernels.attention import Rule, matmul_attention, matmul_gradients
from lorakit.kernels.packed_sequences import Segments

in_force: dict[int, Segments] = {}
"""The segments of the batch at hand, by a number that later batches of the model have too."""

_HOW = "Tensor? seed, int key, float scale, bool causal, int? window, float? softcap, float dropout"


def custom_op_attention(
    q: Float[Tensor, "rows heads width d"],
    k: Float[Tensor, "rows kv_heads width d"],
    v: Float[Tensor, "rows kv_heads width d_v"],
    key: int,
    rule: Rule,
) -> Float[Tensor, "rows width heads d_v"]:
    """Return attention within each segment by batched products, from compiled code.

    Args:
        q: queries; heads that follow each other share a head of k and v.
        k: keys.
        v: values.
        key: the number under which the segments are in force, in the forward and backward pass.
        rule: which keys a query sees.

    Raises:
        ModelError: the segments are not those of a batch of this size.
    """
    # A number of Python's would have to be known before the compiled code runs.
    seed = torch.randint(2**62, ()) if rule.dropout else None
    how = (rule.scale, rule.causal, rule.window, rule.softcap, rule.dropout)
    found: Tensor = torch.ops.lorakit.segment_attention(q, k, v, seed, key, *how)
    return found


@torch.library.custom_op(
    "lorakit::segment_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_HOW}) -> Tensor",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    segments, rule, seed = _read(*how)
    expected = (len(segments.lengths), segments.width)
    if (q.shape[0], q.shape[2]) != expected or k.shape[2] != segments.width:
        raise ModelError(
            f"queries of {q.shape[0]}×{q.shape[2]} tokens and keys of {k.shape[2]} cannot be kept "
            f"apart by segments of {expected[0]}×{expected[1]}"
        )
    return matmul_attention(q, k, v, segments, rule, seed)


@torch.library.custom_op(
    "lorakit::segment_attention_gradients",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor, Tensor)",
)
def _gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return matmul_gradients(gradient, q, k, v, *_read(*how))


def _read(seed: Tensor | None, key: int, *rule: Any) -> tuple[Segments, Rule, int]:
    """Return what the operations are told, as the products take it."""
    scale, causal, window, softcap, dropout = rule
    made = Rule(scale=scale, causal=causal, window=window, softcap=softcap, dropout=dropout)
    return in_force[key], made, 0 if seed is None else int(seed)


@_attend.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@_gradients.register_fake
def _shapes(gradient: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (x.new_empty(x.transpose(1, 2).shape) for x in given[:3])
    return of_q, of_k, of_v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, seed, *how = inputs
    ctx.save_for_backward(q, k, v, seed)
    ctx.how = how


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.lorakit.segment_attention_gradients(gradient, *ctx.saved_tensors, *ctx.how)
    return (*(x.transpose(1, 2) for x in found), None, *(None for _ in ctx.how))


_attend.register_autograd(_backward, setup_context=_keep)
