"""What a run keeps for the backward pass: the setting `memory`, applied to a model."""

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
"""Which results blocks keep, by setting; those of `fast` keep all that autograd asks for."""


@contextmanager
def training_memory(model: PreTrainedModel, config: TrainConfig) -> Iterator[None]:
    """Let a model keep what `config.memory` says, for as long as the context lasts."""
    save_policy = SAVE_POLICIES.get(config.memory)
    # What a compiler fuses keeps no more than ours.
    is_ours = fast() and not config.compile
    with (
        _without_cache(model),
        memory_efficient(model) if is_ours else nullcontext(),
        recomputing(model, save_policy, offload=config.offload) if save_policy else nullcontext(),
    ):
        yield


def check_memory(model: PreTrainedModel, config: TrainConfig) -> None:
    """Make sure that a model on this machine can be trained with the settings of memory.

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
    """Keep a decoder from collecting keys and values for a generation that never comes."""
    before = getattr(model.config, "use_cache", None)
    if before:
        model.config.use_cache = False
    try:
        yield
    finally:
        if before:
            model.config.use_cache = before
