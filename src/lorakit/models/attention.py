"""Attention within packed sequences in transformers' models, switched on for a `with` block.

transformers looks the attention function up by a name in the model's config, in each layer and each
forward pass. So one assignment to the config replaces the model's function by the one here, and
another restores it. Like flash attention, the function gets no mask: a layer passes what it needs
as keywords, and the packed sequences say which token sees which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.kernels.attention import AttentionRule, packed_attention
from lorakit.kernels.custom_op_attention import custom_op_attention, in_force
from lorakit.kernels.packed_sequences import PackedSequences
from lorakit.models.base import base_modules
from lorakit.upstream.private_names import (
    ATTENTION_FLAGS,
    attention_name,
    names_attention,
    set_attention_name,
)

NAME = "lorakit_segments"
"""Name of the function in transformers' registry."""

UNSUPPORTED_KEYWORDS = ("position_bias", "head_mask")
"""Keywords of attention functions that this one does not support: biases and head masks."""


def takes_attention_functions(model: nn.Module) -> bool:
    """Whether a model's layers look their attention function up and pass all as keywords."""
    return all(getattr(model, flag, False) for flag in ATTENTION_FLAGS)


@contextmanager
def attention_within(model: nn.Module, packed: PackedSequences | None) -> Iterator[None]:
    """Restrict each token's attention to its own packed sequence, in forward and backward passes.

    The block's end restores what the model had before, also after an error and when nested. Other
    models are unaffected, except those that share this model's config object.

    Args:
        model: a model that `takes_attention_functions`.
        packed: the packed sequences of the batch that the model gets, without a KV cache; None:
            nothing is changed.
    """
    if packed is None:
        yield
        return
    # Imported late: importing lorakit must not import transformers' models.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    configs = list(_configs(model))
    before = [(c, attention_name(c), in_force.get(id(c))) for c in configs]
    try:
        for config in configs:
            _put(config, NAME, packed)
        yield
    finally:
        for config, name, outer in before:
            _put(config, name, outer)


def _put(config: Any, name: str | None, packed: PackedSequences | None) -> None:
    set_attention_name(config, name)
    # Found by the identity of the config that layers read. Recomputed layers run in the backward
    # pass, on CUDA in other threads, where thread-local variables are absent; and not every family
    # passes unknown keywords on to its layers.
    if packed is None:
        in_force.pop(id(config), None)
    else:
        in_force[id(config)] = packed


def _configs(model: nn.Module) -> Iterator[Any]:
    """Each config that a layer of the model reads, once."""
    seen: set[int] = set()
    for _, module in base_modules(model):
        config = getattr(module, "config", None)
        if names_attention(config) and id(config) not in seen:
            seen.add(id(config))
            yield config


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers' layers call.

    Shapes: query (rows, heads, length, d), key and value (rows, key heads, length, d).

    Returns:
        The output (rows, length, heads, d), and None for attention weights.

    Raises:
        ModelError: the layer needs something that this function does not support.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rule = AttentionRule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        window=sliding_window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.detach(),
        dropout=dropout,
    )
    problems = [
        f"{name} is asked for" for name in UNSUPPORTED_KEYWORDS if asked.get(name) is not None
    ]
    if attention_mask is not None:
        problems.append("it has a mask of its own")
    if s_aux is not None and s_aux.requires_grad and torch.is_grad_enabled():
        problems.append("its sinks are trained: set packing: off")
    if sliding_window is not None and not causal:
        problems.append("it has a window to both sides")
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling:
        problems += _wrong_sizes(query, key, in_force[id(module.config)])
    if problems:
        raise ModelError.listing(
            f"{type(module).__name__} cannot keep packed sequences apart", problems
        )
    if is_compiling:
        return custom_op_attention(query, key, value, id(module.config), rule), None
    return packed_attention(query, key, value, in_force[id(module.config)], rule), None


def _wrong_sizes(query: Tensor, key: Tensor, packed: PackedSequences) -> list[str]:
    """A line for queries or keys whose batch size or length is not that of the packed sequences."""
    expected = (len(packed.lengths), packed.width)
    return [
        f"{name} of {each.shape[0]}×{each.shape[2]} tokens, not {expected}"
        for name, each in (("queries", query), ("keys", key))
        if (each.shape[0], each.shape[2]) != expected
    ]
