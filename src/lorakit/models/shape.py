"""The shape of a model: its context length, whether its attention is causal, and its width."""

from __future__ import annotations

from typing import Any

from torch import nn

OFFSET = ("roberta", "xlm-roberta")
"""Families that count positions from the one after the pad token's."""
SILENT = ("bloom",)
"""Causal families whose attention modules have no `is_causal` attribute."""


def context_length(model: nn.Module) -> int | None:
    """The most tokens that a sequence may have; None: the model has no limit of its own."""
    config: Any = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    return longest - (config.pad_token_id + 1 if config.model_type in OFFSET else 0)


def is_causal(model: nn.Module) -> bool:
    """Whether a token attends only to itself and to tokens before it."""
    if getattr(getattr(model, "config", None), "model_type", "") in SILENT:
        return True
    return any(getattr(module, "is_causal", False) for module in model.modules())


def hidden_size(model: nn.Module) -> int | None:
    """The width of the residual stream; None: the model's config does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None
