"""PreEmbed and PreLayer: trained tokens around the prompt (section 5.1)."""

from __future__ import annotations

from torch import nn

from lorakit.method_config import PrefixConfig
from lorakit.methods.claims import Claims


def claim(model: nn.Module, config: PrefixConfig) -> Claims:
    """Return what trained tokens trains of a model.

    Raises:
        TargetError: the model lacks what it needs.
    """
    return Claims()
