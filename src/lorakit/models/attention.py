"""transformers' models with attention within packed sequences, for as long as a block lasts.

transformers looks the attention function up by a name in the model's config, in each layer and each
forward pass. So a function of our own takes the place of the model's with one assignment, and
gives it back with another. Like flash attention, it gets no mask: a layer passes all settings by
keyword, and the packed sequences say which token sees which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.kernels.attention import Rule, packed_attention
from lorakit.kernels.custom_op_attention import custom_op_attention, in_force
from lorakit.kernels.packed_sequences import PackedSequences
from lorakit.models.base import base_modules
from lorakit.upstream.private_names import (
    ATTENTION_FLAGS,
    attention_name,
    names_attention,
    set_attention_name,
)

NAME = "lorakit_packed_sequences"
"""What the function is called in transformers' registry."""

UNKNOWN = ("s_aux", "position_bias", "head_mask")
"""Keywords of attention functions that this one has no answer to: sinks, biases, switched heads."""


def takes_attention_functions(model: nn.Module) -> bool:
    """Whether a model's layers look their attention up, and say all in keywords."""
    return all(getattr(model, flag, False) for flag in ATTENTION_FLAGS)


@contextmanager
def attention_within(model: nn.Module, packed: PackedSequences | None) -> Iterator[None]:
    """Let tokens attend only to their own sequence, in forward and backward passes inside a block.

    What the model had before is restored, also after an error and when nested. Other models are not
    concerned, but for those that share this one's config object.

    Args:
        model: a model that `takes_attention_functions`.
        packed: of the batch that it will be given, without cache; None: nothing is changed.
    """
    if packed is None:
        yield
        return
    _register()
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
    # By the identity of the config that layers look at. They run again in the backward pass, on
    # CUDA in other threads: neither keywords that all families would have to hand on nor variables
    # of a thread would reach them.
    if packed is None:
        in_force.pop(id(config), None)
    else:
        in_force[id(config)] = packed


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield each config that the model's layers look at, once."""
    seen: set[int] = set()
    for _, module in base_modules(model):
        config = getattr(module, "config", None)
        if names_attention(config) and id(config) not in seen:
            seen.add(id(config))
            yield config


def _register() -> None:
    # Imported late: importing lorakit must not import transformers' models.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


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
    **asked: Any,
) -> tuple[Tensor, None]:
    """Attention (rows, length, heads, d), as transformers' attention functions return it.

    Raises:
        ModelError: the layer asks for something that this function does not do.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rule = Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        window=sliding_window,
        softcap=softcap,
        dropout=dropout,
    )
    problems = [f"{name} is asked for" for name in UNKNOWN if asked.get(name) is not None]
    if attention_mask is not None:
        problems.append("it has a mask of its own")
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
    """Which of the tensors has not the size of the batch of these packed sequences."""
    expected = (len(packed.lengths), packed.width)
    return [
        f"{name} of {each.shape[0]}×{each.shape[2]} tokens, not {expected}"
        for name, each in (("queries", query), ("keys", key))
        if (each.shape[0], each.shape[2]) != expected
    ]
