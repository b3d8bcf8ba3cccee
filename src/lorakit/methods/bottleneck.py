"""Adapter layers: bottlenecks behind layers of the base (section 5.1)."""

from __future__ import annotations

from torch import nn

from lorakit.method_config import BottleneckConfig
from lorakit.methods.claims import Claims


def claim(model: nn.Module, config: BottleneckConfig) -> Claims:
    """Return what bottlenecks trains of a model.

    Raises:
        TargetError: the model lacks what it needs.
    """
    return Claims()
