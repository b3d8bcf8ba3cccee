"""Gradients under torch's reentrant checkpointing, which drops those of a block with frozen input.

Reentrant checkpointing records a block only if one of its inputs requires grad. With a frozen base
none does, and the adapters inside would silently get no gradient. A hook lets the input require
grad, at the lowest adapted block only: what lies below stays without a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.methods.layer import AdaptedLayer
from lorakit.models.base import base_modules


def adapted_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and block of those that transformers can checkpoint and that hold adapters."""
    # Imported late: it sets up loggers, which importing lorakit must not.
    from transformers.modeling_layers import GradientCheckpointingLayer

    for path, block in base_modules(model):
        if isinstance(block, GradientCheckpointingLayer) and any(
            isinstance(inner, AdaptedLayer) for _, inner in base_modules(block)
        ):
            yield path, block


def let_input_require_grad(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return a block's inputs with one that requires grad, where only that makes it train.

    A forward pre-hook: None leaves the inputs as they are. It has no state, so that a model with it
    can be copied and pickled.
    """
    if not (torch.is_grad_enabled() and _is_reentrant(block)):
        return None
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    trained = any(parameter.requires_grad for parameter in block.parameters())
    if not trained or not tensors or any(tensor.requires_grad for tensor in tensors):
        return None
    first = tensors[0]
    return tuple(x.detach().requires_grad_() if x is first else x for x in inputs)


def _is_reentrant(block: Any) -> bool:
    """Tell whether a block's next forward pass runs in reentrant checkpointing."""
    if not (block.training and block.gradient_checkpointing):
        return False
    keywords = getattr(block._gradient_checkpointing_func, "keywords", {})
    return bool(keywords.get("use_reentrant", True))  # torch's own default
