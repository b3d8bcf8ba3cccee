"""The setting `shard: base`: torch's FSDP2 divides the frozen base over the processes.

Between its calls a block is a share of each of its weights; the processes give each other the rest
for the forward and the backward pass of that block alone. What is trained is small, and whole in
each of them: its gradients are summed as without `shard`, and checkpoints, folders and resuming
are the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError
from lorakit.models.base import base_modules, base_parameters
from lorakit.training.memory.activation_checkpointing import has_blocks
from lorakit.training.processes import count


def is_sharded(config: TrainConfig) -> bool:
    """Whether the settings divide the base, and there are several processes to divide it over."""
    return config.shard is not None and count() > 1


def idle_shard(config: TrainConfig) -> tuple[str, ...]:
    """The line of `shard` among the settings without effect, where one process trains alone."""
    return () if config.shard is None or count() > 1 else ("shard (there is one process)",)


def check_shard(config: TrainConfig, *, loaded: bool) -> None:
    """Make sure that the other settings go with `shard`, before anything is read.

    Args:
        config: the settings of the run.
        loaded: whether the base is loaded already.

    Raises:
        ConfigError: they do not; every problem is listed.
    """
    if not is_sharded(config):
        return
    problems = []
    if config.quantize is not None:
        problems.append(
            "quantize: weights in few bits cannot be gathered from shares: leave one of both out"
        )
    if config.compile:
        problems.append("compile: gathering a block's weights is not known to the compiler")
    if loaded:
        problems.append("model: one that is loaded already would stay divided: give its name")
    if problems:
        raise ConfigError.listing("shard: base cannot be used with these settings", problems)


def shard_base(model: PreTrainedModel) -> None:
    """Divide each weight of a base over the processes, and leave what adapters hold whole.

    On a GPU no process has more there than its share and one block; each has read the whole base
    into the CPU's memory before.

    Args:
        model: the base on the CPU, with its adapters. It cannot be made whole again.

    Raises:
        ConfigError: it has no blocks, so that all of it would be gathered at once.
    """
    # Imported late: they take a second, and most runs are in one process.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not has_blocks(model):
        raise ConfigError(
            f"shard: base gathers one block at a time, and {type(model).__name__} has none that "
            "transformers can checkpoint: leave it out"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = dist.group.WORLD
    assert every is not None, "processes are a group by now"
    mesh = DeviceMesh.from_group(every, device)
    # A single number has no rows to divide.
    divided = {each for _, each in base_parameters(model) if each.dim()}
    whole = set(model.parameters()) - divided
    # Inner blocks first, as FSDP2 wants it, and last what is in none of them.
    modules = [module for _, module in base_modules(model)]
    blocks = [each for each in modules if isinstance(each, GradientCheckpointingLayer)]
    for module in (*reversed(blocks), model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
