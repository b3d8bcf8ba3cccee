"""The setting `memory`, applied to a model: what a run keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError
from lorakit.kernels.choice import fast
from lorakit.training.memory.activation_checkpointing import (
    has_blocks,
    matmuls,
    narrow_matmuls,
    recomputing,
)
from lorakit.training.memory.memory_efficient import memory_efficient

SAVE_POLICIES = {"balanced": matmuls, "low": narrow_matmuls}
"""The save policy of blocks by setting; with `fast` they keep all that autograd saves."""


@contextmanager
def training_memory(model: PreTrainedModel, config: TrainConfig) -> Iterator[None]:
    """Apply `config.memory` to a model inside a `with` block."""
    save_policy = SAVE_POLICIES.get(config.memory)
    # Fused code of a compiler saves as few activations.
    replaces_modules = fast() and not config.compile
    with (
        _without_cache(model),
        memory_efficient(model) if replaces_modules else nullcontext(),
        recomputing(model, save_policy, offload=config.offload) if save_policy else nullcontext(),
    ):
        yield


def check_memory(model: PreTrainedModel, config: TrainConfig) -> None:
    """Make sure that a model can be trained on this machine with the settings of memory.

    Raises:
        ConfigError: it cannot.
    """
    problems = []
    if config.memory in SAVE_POLICIES and not has_blocks(model):
        problems.append(
            f"memory: {config.memory} recomputes blocks, and {type(model).__name__} has none that "
            "transformers can checkpoint: use memory: fast"
        )
    if config.compile and not has_blocks(model):
        problems.append(
            f"compile compiles one block for all, and {type(model).__name__} has none that "
            "transformers could checkpoint: leave it out"
        )
    if config.offload and not torch.cuda.is_available():
        problems.append(
            "offload: moves activations from a GPU to the CPU's memory, and there is no GPU here: "
            "leave it out"
        )
    if problems:
        raise ConfigError.listing("the settings of memory cannot be used", problems)


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Turn off the cache of keys and values, for generation alone, inside a `with` block."""
    before = getattr(model.config, "use_cache", None)
    if before:
        model.config.use_cache = False
    try:
        yield
    finally:
        if before:
            model.config.use_cache = before
