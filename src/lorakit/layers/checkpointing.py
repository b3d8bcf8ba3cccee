"""Gradient checkpointing of transformers' blocks, as adapters need it.

A block that is recomputed in the backward pass runs under the frame of its forward pass, whatever
the route is by then. And torch's reentrant checkpointing records a block only if one of its inputs
requires grad; with a frozen base none does, and the adapters inside would silently get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.route import Route
from lorakit.models.base import base_modules
from lorakit.upstream.private_names import checkpoint_function, in_backward, set_checkpoint_function


class RoutedCheckpoint:
    """Checkpoints one block as transformers does, and recomputes it under the same frame.

    Takes the place of the block's `_gradient_checkpointing_func`.
    """

    def __init__(self, block: nn.Module, route: Route) -> None:
        self.block = block
        self.route = route
        self.checkpoint: Callable[..., Any] = checkpoint_function(block)

    def __call__(self, function: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """The result of function(*inputs), which the backward pass will call once more."""
        frame = replace(self.route.top, under=None)

        def under_one_frame(*args: Any) -> Any:
            if not in_backward():
                return function(*args)
            with self.route.own.pushed(frame):
                return function(*args)

        # torch's own default is to be reentrant.
        if getattr(self.checkpoint, "keywords", {}).get("use_reentrant", True):
            inputs = let_input_require_grad(self.block, inputs)
        return self.checkpoint(under_one_frame, *inputs, **settings)


def stacks_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each stack of blocks that transformers can checkpoint."""
    for path, module in base_modules(model):
        if not isinstance(module, nn.ModuleList) and any(_blocks(module)):
            yield path, module


def keep_routes(stack: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Have the adapted blocks of a stack checkpointed with their routes.

    A forward pre-hook, because checkpointing may be turned on at any time. It has no state, so that
    a model with it can be copied and pickled.
    """
    if not stack.training or torch.compiler.is_compiling():
        return
    for block in _blocks(stack):
        if not block.gradient_checkpointing or _is_routed(block):
            continue
        layers = (m for _, m in base_modules(block) if isinstance(m, AdaptedLayer))
        adapted = next(layers, None)
        if adapted is not None:
            set_checkpoint_function(block, RoutedCheckpoint(block, adapted.adapter_route))


def forget_routes(stack: nn.Module) -> None:
    """Give the blocks of a stack transformers' own checkpointing back."""
    for block in filter(_is_routed, _blocks(stack)):
        set_checkpoint_function(block, checkpoint_function(block).checkpoint)


def let_input_require_grad(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A block's inputs, one of which requires grad where only that makes the block train.

    That is so at the lowest adapted block only: the blocks below have no backward pass.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())
    if not trains or not tensors or any(tensor.requires_grad for tensor in tensors):
        return inputs
    first = tensors[0]
    return tuple(x.detach().requires_grad_() if x is first else x for x in inputs)


def _blocks(stack: nn.Module) -> Iterator[Any]:
    """Yield a stack's own blocks, which may be in lists."""
    # Imported late: it sets up loggers, which importing lorakit must not.
    from transformers.modeling_layers import GradientCheckpointingLayer

    for child in stack.children():
        inner = child.children() if isinstance(child, nn.ModuleList) else (child,)
        yield from (module for module in inner if isinstance(module, GradientCheckpointingLayer))


def _is_routed(block: Any) -> bool:
    return isinstance(checkpoint_function(block), RoutedCheckpoint)
