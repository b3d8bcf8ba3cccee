"""Full fine-tuning, and that of the last blocks alone (FT and FT^Top2; section 5.1)."""

from __future__ import annotations

from torch import nn

from lorakit.method_config import FullConfig
from lorakit.methods.claims import Claims


def claim(model: nn.Module, config: FullConfig) -> Claims:
    """Return what full fine-tuning trains of a model.

    Raises:
        TargetError: the model lacks what it needs.
    """
    return Claims()
