"""The shape of a model: its context length, whether its attention is causal, and its width."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.errors import ModelError
from lorakit.models.base import base_modules
from lorakit.models.families import family_name

SILENT = ("bloom",)
"""Causal families whose attention modules have no `is_causal` attribute."""


def context_length(model: nn.Module) -> int | None:
    """The most tokens that a sequence may have; None: the model has no limit of its own.

    It is what the config says, or what rotary positions that are scaled reach, and no more than a
    table of learnt positions has, which some count from the one after the pad token's (RoBERTa).
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    tables = (
        module.num_embeddings - module.padding_idx - 1
        for path, module in base_modules(model)
        if isinstance(module, nn.Embedding)
        and module.padding_idx is not None
        and "position" in path.rpartition(".")[2]
    )
    return min([max(longest, _scaled_positions(config)), *tables])


def _scaled_positions(config: Any) -> int:
    """The positions that scaled rotary embeddings reach; 0 where the config does not say."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return 0
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return int(original * factor) if original and factor else 0


def is_causal(model: nn.Module) -> bool:
    """Whether a token attends only to itself and to tokens before it."""
    if getattr(getattr(model, "config", None), "model_type", "") in SILENT:
        return True
    return any(getattr(module, "is_causal", False) for module in model.modules())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has a stack that reads and another one that writes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoder_start(model: nn.Module) -> int | None:
    """The token that the decoder of an encoder-decoder begins with; None: it is no such model.

    Raises:
        ModelError: it does not say which.
    """
    if not is_encoder_decoder(model):
        return None
    config: Any = model.config
    generation = getattr(model, "generation_config", None)
    for own in (config, generation):
        start = getattr(own, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise ModelError(
        f"the config of {family_name(model)} has no decoder_start_token_id, with which its answers"
        " begin: set it in the base's config.json"
    )


def hidden_size(model: nn.Module) -> int | None:
    """The width of the residual stream; None: the model's config does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None
