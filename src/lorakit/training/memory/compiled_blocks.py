"""The setting `compile`: the blocks of a model go through torch.compile while they are trained.

Blocks are equal but for their weights, so that one compiled forward and one backward pass serve
them all: a model of thirty blocks is compiled in the time of one. For that, compiled code must not
know which block it is in: what the route says is looked up before. Lengths are dynamic. Inside,
plain torch is what the compiler can fuse, and our own kernels stand aside, but for attention within
packed sequences, which is one operation to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.attachment.state import attached
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError, TrainingError
from lorakit.layers.layer import Operations, Route, adapted_layers
from lorakit.training.memory.activation_checkpointing import blocks_with_gradients
from lorakit.upstream.private_names import (
    call_uncompiled,
    compile_errors,
    compiled_call,
    set_compiled_call,
)

LENGTHS = 16
"""Padded rows of a compiled model are as long as a multiple of so many tokens."""


@contextmanager
def compiled_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Compile a model's blocks when they are first trained; after the block it is as it was.

    Compiled code does what the route says at the beginning.
    """
    route = attached(model).route
    operations = route.operations
    layers = [layer for _, layer in adapted_layers(model)]
    run = _compiled_anew()
    chosen = [block for _, block in blocks_with_gradients(model)]
    before = [compiled_call(block) for block in chosen]
    for layer in layers:
        layer.adapter_pinned = (
            None if operations is None else operations.get(layer.adapter_number),
        )
    for block in chosen:
        set_compiled_call(block, _CompiledBlock(block, run, route, operations))
    try:
        yield
    finally:
        for block, own in zip(chosen, before, strict=True):
            set_compiled_call(block, own)
        for layer in layers:
            del layer.adapter_pinned


def _compiled_anew() -> Callable[..., Any]:
    """A function that runs a block in compiled code, which goes when the function does."""
    # The compiler keeps what it made beside a function's code, and at most eight of it: other runs
    # of the same process have code of their own.
    fresh = FunctionType(_run.__code__.replace(), _run.__globals__)
    return torch.compile(fresh, dynamic=True, fullgraph=True)


def _run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call_uncompiled(block, *args, **kwargs)


class _CompiledBlock:
    """Calls compiled code where that has been made for it, and the block itself elsewhere.

    Evaluation, what is below the lowest adapter, and the block that holds it would each be compiled
    for itself, which takes longer than it can ever save.
    """

    def __init__(
        self, block: nn.Module, run: Callable[..., Any], route: Route, operations: Operations | None
    ) -> None:
        self.block = block
        self.run = run
        self.route = route
        self.operations = operations

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output.

        Raises:
            TrainingError: the compiler cannot compile it.
        """
        if not self._is_for(*args, *kwargs.values()):
            return call_uncompiled(self.block, *args, **kwargs)
        try:
            return self.run(self.block, *args, **kwargs)
        except compile_errors() as error:
            first = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"torch.compile cannot compile {type(self.block).__name__}: {first}\n"
                "Train without compile"
            ) from error

    def _is_for(self, *inputs: Any) -> bool:
        trains = self.block.training and torch.is_grad_enabled()
        receives = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return trains and receives and self.route.operations is self.operations


def check_compile(config: TrainConfig) -> None:
    """Make sure that the other settings go with `compile`.

    Raises:
        ConfigError: they do not; every problem is listed.
    """
    if not config.compile:
        return
    problems = []
    if config.memory != "fast":
        problems.append(
            f"memory: {config.memory} watches single operations, which a compiled model has not: "
            "use memory: fast"
        )
    if config.quantize is not None:
        problems.append("quantize: weights in few bits are not known to the compiler")
    if config.sweep is not None:
        problems.append(
            "sweep: rows of several adapters change what the model does from batch to batch"
        )
    if any(method.startswith("prefix-") for method in config.method):
        problems.append(
            "method: virtual tokens are put into rows by code that a compiler can't follow"
        )
    if problems:
        raise ConfigError.listing("compile cannot be used with these settings", problems)
