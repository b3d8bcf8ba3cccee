"""The setting `compile`: torch.compile on the blocks of a model while they are trained.

Blocks differ in their weights alone, so one compiled forward and one backward pass serve all: a
model of thirty blocks is compiled in the time of one. The compiled code must not depend on the
block it runs in, so the operations that the route chooses for each layer are looked up before, and
pinned to the layer. Lengths are dynamic. Inside a block lorakit's own kernels are off, because the
compiler fuses plain torch; attention within packed sequences is a custom op to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.attachment.state import attachment_for
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError, TrainingError
from lorakit.layers.adapted_layer import adapted_layers
from lorakit.layers.operation import Operations
from lorakit.layers.route import Route
from lorakit.training.memory.activation_checkpointing import blocks_with_gradients
from lorakit.upstream.private_names import (
    call_uncompiled,
    compile_errors,
    compiled_call,
    set_compiled_call,
)

LENGTHS = 16
"""The length of a compiled model's padded rows is a multiple of this."""


@contextmanager
def compiled_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Compile a model's blocks at their first training step inside a `with` block.

    The compiled code applies the operations that are active when the `with` block is entered.
    """
    route = attachment_for(model).route
    operations = route.top.operations
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
    """A function that runs a block in compiled code, which is freed together with the function."""
    # The compiler caches at most eight graphs per code object: each run has a code object of its
    # own, so that runs in one process do not use up the cache.
    fresh = FunctionType(_run.__code__.replace(), _run.__globals__)
    return torch.compile(fresh, dynamic=True, fullgraph=True)


def _run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call_uncompiled(block, *args, **kwargs)


class _CompiledBlock:
    """Calls the compiled code in training, and the block itself elsewhere.

    Evaluation, the blocks below the lowest adapter, and the block that holds it would each need a
    graph of their own, and compiling one takes longer than it saves.
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
        if not self._uses_compiled(*args, *kwargs.values()):
            return call_uncompiled(self.block, *args, **kwargs)
        try:
            return self.run(self.block, *args, **kwargs)
        except compile_errors() as error:
            first = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"torch.compile cannot compile {type(self.block).__name__}: {first}\n"
                "Train without compile"
            ) from error

    def _uses_compiled(self, *inputs: Any) -> bool:
        trains = self.block.training and torch.is_grad_enabled()
        receives = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return trains and receives and self.route.top.operations is self.operations


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
