"""The learning rate of each trained tensor: by a rule of its method and the width of the base.

The rule (docs/methods.md says how it was found): the rate of a method on a base 576 wide, times
(576/d) to a power. It holds where the settings have no rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.attachment.plan import Plan
from lorakit.config.method_defaults import REFERENCE_WIDTH, defaults_of
from lorakit.config.train import TrainConfig

PREFERENCE_SHARE = 0.1
"""The share of the usual rate that preferences are trained at. TRL's own defaults, for whole
models, are 1e-6 for DPO and 2e-5 for texts."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The peak learning rate of a method's weights, and where it is from."""

    value: float
    reason: str

    def __str__(self) -> str:
        """The rate and its reason, as text."""
        return f"{self.value:g} ({self.reason})"


def rates_by_method(
    config: TrainConfig, plan: Plan, width: int | None, *, task: str = "generation"
) -> dict[str, Rate]:
    """The peak learning rate of each method that an adapter has tensors of.

    Args:
        config: the settings.
        plan: what is trained.
        width: the width of the base, where it is known.
        task: what it is trained for.
    """
    methods = sorted(set(plan.methods.values()))
    return {method: rate_of(config, method, width, task=task) for method in methods}


def rate_of(
    config: TrainConfig, method: str, width: int | None, *, task: str = "generation"
) -> Rate:
    """The peak learning rate of a method: that of the settings, else by the rule."""
    if config.learning_rate is not None:
        return Rate(value=config.learning_rate, reason="as set")
    if task == "preference":
        usual = rate_of(config, method, width)
        value = float(f"{usual.value * PREFERENCE_SHARE:.2g}")
        return Rate(value=value, reason=f"for preferences a tenth of {usual}")
    own = defaults_of(method, config.lora)
    if width is None:
        reason = f"the default of {method}; the base does not say how wide it is"
        return Rate(value=own.rate_at(REFERENCE_WIDTH), reason=reason)
    power = "" if own.exponent == 1 else f"^{own.exponent:g}"
    falls = f"{own.learning_rate:g}·({REFERENCE_WIDTH}/d){power}"
    rule = falls if own.exponent else "the same at every width"
    return Rate(
        value=own.rate_at(width),
        reason=f"the default of {method} on a base of width {width}: {rule}",
    )


def learning_rates(config: TrainConfig, plan: Plan, rates: Mapping[str, Rate]) -> dict[str, float]:
    """The peak learning rate of each tensor of an adapter, by its name.

    B's is `lora_plus_ratio` times its method's own (LoRA+, Hayou et al. 2024, section 4).

    Args:
        config: the settings.
        plan: what is trained.
        rates: the rate of each method.
    """
    return {
        name: rates[method].value * (config.lora_plus_ratio if name.endswith(".lora_b") else 1.0)
        for name, method in plan.methods.items()
    }


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
