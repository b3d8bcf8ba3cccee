"""A base model in all but its weights: modules and shapes on the meta device, without memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.errors import ModelError
from lorakit.models.load import config_of, give_padding_token
from lorakit.models.source import explained, quiet, source_of
from lorakit.models.tasks import TASKS, model_task


def load_without_weights(
    name: str | os.PathLike[str],
    *,
    dtype: str,
    task: str = "generation",
    labels: Sequence[str] | None = None,
) -> PreTrainedModel:
    """A base as `load_model` would load it, without its weights; only its config is read.

    Args:
        name: as in `load_model`; a folder needs no more than a config.json.
        dtype: precision of the weights.
        task: generation, classification or regression.
        labels: names of the classes.

    Raises:
        ModelError: there is no such config, or transformers cannot build a model from it.
    """
    config = config_of(name)
    for setting, value in TASKS[task].head_settings(labels).items():
        setattr(config, setting, value)
    return build_without_weights(config, dtype=dtype, task=task, name=os.fspath(name))


def build_without_weights(
    config: PreTrainedConfig, *, dtype: str, task: str = "generation", name: str = ""
) -> PreTrainedModel:
    """A model of a config, without its weights.

    Raises:
        ModelError: transformers cannot build it.
    """
    kind: Any = getattr(transformers, model_task(task, config).auto_class)
    if task != "generation" and config.pad_token_id is None:
        config.pad_token_id = 0
    shown = name or type(config).__name__
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = kind.from_config(config, dtype=getattr(torch, dtype))
    # A config may be wrong in any way, and each family fails in its own.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"{shown!r} cannot be built by transformers for {task}: {reason.rstrip('.')}. Its "
            "config.json must name a model_type that transformers has, with all its sizes"
        ) from error
    model.requires_grad_(False)
    return model.eval()


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, which has a padding token, without the base.

    Raises:
        ModelError: it cannot be found or read.
    """
    asked = os.fspath(name)
    with quiet():
        found = source_of(asked)
        with explained(asked, found, "its tokenizer"):
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                found, trust_remote_code=False
            )
    give_padding_token(tokenizer, asked)
    return tokenizer
