"""Attention within packed sequences as a custom operator, which torch.compile does not trace into.

If it traced into attention, the lengths of a batch's sequences would become constants of the
compiled code, and each batch would be compiled anew. The operator gets an integer key instead, and
looks the sequences up by it when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.kernels.attention import AttentionRule, matmul_attention, matmul_gradients
from lorakit.kernels.packed_sequences import PackedSequences

in_force: dict[int, PackedSequences] = {}
"""The packed sequences of the current batch by key; all batches of a model have the same key."""

_HOW = (
    "Tensor? seed, Tensor? sinks, int key, float scale, bool causal, int? window, float? softcap,"
    " float dropout"
)


def custom_op_attention(
    q: Float[Tensor, "rows heads width d"],
    k: Float[Tensor, "rows kv_heads width d"],
    v: Float[Tensor, "rows kv_heads width d_v"],
    key: int,
    rule: AttentionRule,
) -> Float[Tensor, "rows width heads d_v"]:
    """Attention within each packed sequence by batched matmuls, from compiled code.

    Args:
        q: queries; consecutive heads share a head of k and v.
        k: keys.
        v: values.
        key: of the packed sequences in `in_force`, in the forward and the backward pass.
        rule: which keys a query sees.

    Raises:
        ModelError: the packed sequences are not those of a batch of this size.
    """
    # A tensor, since an int would have to be known before the compiled code runs.
    seed = torch.randint(2**62, ()) if rule.dropout else None
    how = (rule.scale, rule.causal, rule.window, rule.softcap, rule.dropout)
    found: Tensor = torch.ops.lorakit.packed_attention(q, k, v, seed, rule.sinks, key, *how)
    return found


@torch.library.custom_op(
    "lorakit::packed_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_HOW}) -> Tensor",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    packed, rule, seed = _read(*how)
    expected = (len(packed.lengths), packed.width)
    if (q.shape[0], q.shape[2]) != expected or k.shape[2] != packed.width:
        raise ModelError(
            f"queries of {q.shape[0]}×{q.shape[2]} tokens and keys of {k.shape[2]} cannot be kept "
            f"apart by packed sequences of {expected[0]}×{expected[1]}"
        )
    return matmul_attention(q, k, v, packed, rule, seed)


@torch.library.custom_op(
    "lorakit::packed_attention_gradients",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor, Tensor)",
)
def _gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return matmul_gradients(gradient, q, k, v, *_read(*how))


def _read(
    seed: Tensor | None, sinks: Tensor | None, key: int, *rule: Any
) -> tuple[PackedSequences, AttentionRule, int]:
    """The packed sequences, the rule and the seed, from the operator's arguments."""
    scale, causal, window, softcap, dropout = rule
    made = AttentionRule(
        scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks, dropout=dropout
    )
    return in_force[key], made, 0 if seed is None else int(seed)


@_attend.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@_gradients.register_fake
def _shapes(gradient: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (x.new_empty(x.transpose(1, 2).shape) for x in given[:3])
    return of_q, of_k, of_v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, seed, sinks, *how = inputs
    ctx.save_for_backward(q, k, v, seed, sinks)
    ctx.how = how


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.lorakit.packed_attention_gradients(gradient, *ctx.saved_tensors, *ctx.how)
    return (*(x.transpose(1, 2) for x in found), None, None, *(None for _ in ctx.how))


_attend.register_autograd(_backward, setup_context=_keep)
