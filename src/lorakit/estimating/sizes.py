"""Sizes that follow from what is trained: files, and the share of one of several processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lorakit.attachment.plan import Plan
from lorakit.config.estimate import EstimateConfig
from lorakit.estimating.training_step import CountedStep
from lorakit.training.processes import PIECE_BYTES

TENSOR_HEADER_BYTES = 150
"""Of a tensor in a safetensors file: its name, shape and place."""
RECORD_BYTES, IDENTITY_BYTES = 5_000, 43
"""Of an adapter's folder beside its tensors: settings and card; and for each tensor of the base."""
MOMENTS = 2
"""Values that AdamW keeps of each trained one."""


def value_bytes(plan: Plan) -> int:
    """The bytes of a trained value, which are the same for all methods of an adapter."""
    dtype: torch.dtype = getattr(torch, plan.configs[0].dtype)
    return dtype.itemsize


def tensors_bytes(plan: Plan) -> int:
    """The bytes of all tensors of an adapter, in memory and in its file."""
    return value_bytes(plan) * sum(map(math.prod, plan.shapes.values()))


def adapter_bytes(plan: Plan, *, base_tensors: int) -> int:
    """The size of the folder of an adapter, on a base of so many tensors."""
    beside = len(plan.shapes) * TENSOR_HEADER_BYTES + base_tensors * IDENTITY_BYTES
    return tensors_bytes(plan) + beside + RECORD_BYTES


def moments_bytes(plan: Plan) -> int:
    """The size of the optimizer's moments in a checkpoint."""
    return MOMENTS * value_bytes(plan) * plan.parameters + len(plan.shapes) * TENSOR_HEADER_BYTES


def of_process(
    config: EstimateConfig, training: Mapping[str, int], step: CountedStep
) -> tuple[dict[str, int], str]:
    """The memory of one of several processes that train together, and how it is divided.

    Args:
        config: the settings.
        training: the memory of a process with the whole base.
        step: what was counted there; what is trained is whole in each of them.
    """
    made, trained = dict(training), value_bytes(step.plan) * step.plan.parameters
    # Gradients are summed in pieces: the one that is sent, and their sum.
    made["temporary"] += 2 * min(PIECE_BYTES, trained)
    if config.shard is None:
        return made, "each process holds the whole base; with shard: base they divide it"
    # A block is gathered while the one before it computes; embedding and head stay for a pass.
    share, two_blocks = math.ceil(made["weights"] / config.processes), 2 * step.block_bytes
    made["weights"] = share + two_blocks + step.outside_bytes
    # FSDP2 keeps what the processes sent until the next weights are there, beside the weights that
    # it is copied into: at the start of a pass embedding and head are there twice.
    start = dict.fromkeys(made, 0) | {name: made[name] for name in ("adapter", "optimizer")}
    start["weights"] = share + two_blocks + 2 * step.outside_bytes
    made = max(made, start, key=lambda kinds: sum(kinds.values()))
    told = "two blocks are gathered, and what is in none"
    return made, f"the base is divided over {config.processes} processes; {told}"
