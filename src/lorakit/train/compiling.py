"""The setting `compile`: the body of a model goes through torch.compile while it is trained.

The body is all but the output head, whose loss is computed in chunks outside. Batches are padded to
few lengths, and lengths are dynamic, so that it is compiled once for the forward and once for the
backward pass. Inside, plain torch is what the compiler can fuse: our own kernels stand aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from lorakit.config import TrainConfig
from lorakit.errors import ConfigError

LENGTHS = 16
"""Rows of a compiled model are padded to a multiple of so many tokens."""


@contextmanager
def compiled_body(model: PreTrainedModel) -> Iterator[None]:
    """Compile a model's body at its next forward pass; after the block it is as it was."""
    body: nn.Module = model.base_model
    before = body._compiled_call_impl
    body.compile(dynamic=True)
    try:
        yield
    finally:
        body._compiled_call_impl = before


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
    if config.packing == "on":
        problems.append(
            "packing: on gives every batch other segments, each of which would be compiled: leave "
            "it at auto"
        )
    if config.sweep is not None:
        problems.append(
            "sweep: rows of several adapters change what the model does from batch to batch"
        )
    if any(method.startswith("prefix-") for method in config.method):
        problems.append(
            "method: trained tokens are put into rows by code that a compiler can't follow"
        )
    if problems:
        raise ConfigError.listing("compile cannot be used with these settings", problems)
