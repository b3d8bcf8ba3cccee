"""The learning rate of each trained tensor: its method's default, where the settings have none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lorakit.attachment.plan import Plan
from lorakit.config.train import TrainConfig


def learning_rates(config: TrainConfig, plan: Plan) -> dict[str, float]:
    """The peak learning rate of each tensor of an adapter, by its name.

    B's is `lora_plus_ratio` times its method's own (LoRA+, Hayou et al. 2024, section 4).
    """
    return {
        name: config.rate_of(method) * (config.lora_plus_ratio if name.endswith(".lora_b") else 1.0)
        for name, method in plan.methods.items()
    }


def rates_by_method(config: TrainConfig, plan: Plan) -> dict[str, float]:
    """The peak learning rate of each method that an adapter has tensors of."""
    return {method: config.rate_of(method) for method in sorted(set(plan.methods.values()))}


def split_by_rate(
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, nn.Parameter],
    rates: Mapping[str, float],
) -> None:
    """Split an optimizer's parameter groups, in place, so that every tensor has its learning rate.

    Args:
        optimizer: one that has no state yet, and no schedule.
        trained: the tensors by name.
        rates: peak learning rates by the same names.
    """
    rate_of = {id(parameter): rates[name] for name, parameter in trained.items()}
    groups = []
    for group in optimizer.param_groups:
        for rate in dict.fromkeys(rate_of[id(p)] for p in group["params"]):
            own = [p for p in group["params"] if rate_of[id(p)] == rate]
            groups.append({**group, "params": own, "lr": rate})
    optimizer.param_groups[:] = groups
