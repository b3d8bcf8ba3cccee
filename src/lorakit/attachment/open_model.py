"""A base model, with an adapter if there is one, ready to be used as the adapter was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.attach import attach
from lorakit.config.train import DataConfig
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.models.load import load_model
from lorakit.models.quantized import Quantization, quantization_on


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to use, and how to talk to it."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    adapter: Adapter | None
    """The adapter attached to the model; None: the model is the base."""
    task: str
    """generation, classification or regression."""
    labels: tuple[str, ...] | None
    """Names of the classes, for a classifier."""
    data: DataConfig
    """How rows become prompts: as in training, where the caller says nothing else."""


def open_model(
    adapter_path: str | Path | None = None,
    *,
    model: str | None = None,
    dtype: str = "float32",
    task: str | None = None,
    data: DataConfig | None = None,
    quantize: str = "as-trained",
    allow_other_base: bool = False,
) -> Opened:
    """A base with the adapter attached that a folder holds, or the base alone.

    Args:
        adapter_path: the adapter's folder; None: no adapter.
        model: the base. None: the one that the adapter names.
        dtype: precision of the base.
        task: what the model does. None: what the adapter was trained for, else generation.
        data: what differs from the adapter's training in how rows are read.
        quantize: how the base holds its weights: as-trained (as the adapter's card says; without an
            adapter, in `dtype`), none (in `dtype`), 4bit or 8bit.
        allow_other_base: accept a base with other weights.

    Raises:
        ConfigError: neither an adapter nor a model is given.
        AdapterFileError: the adapter's files are unusable, name no base, or do not fit it.
        ModelError: the base cannot be found.
        MissingExtraError: the base is to be quantised, and the library for it is not installed.
    """
    adapter = None if adapter_path is None else Adapter.load(adapter_path)
    card: Mapping[str, Any] = adapter.card if adapter else {}
    base = model or (adapter.base.name if adapter and adapter.base else "")
    if not base and adapter is None:
        raise ConfigError("give an adapter, a model, or both")
    if not base:
        raise AdapterFileError(
            f"{adapter_path} does not say which base it was trained on: name the model"
        )
    task = task or card.get("task") or "generation"
    given = data or DataConfig()
    trained = DataConfig(**card.get("data", {}))
    merged = trained.model_copy(update={k: getattr(given, k) for k in given.model_fields_set})
    labels = merged.labels or card.get("labels")
    labels = tuple(labels) if labels and task == "classification" else None
    loaded, tokenizer = load_model(
        base, dtype=dtype, task=task, labels=labels, quantize=_quantization(quantize, card)
    )
    if adapter is not None:
        attach(loaded, adapter, allow_other_base=allow_other_base)
    return Opened(
        model=loaded, tokenizer=tokenizer, adapter=adapter, task=task, labels=labels, data=merged
    )


def _quantization(asked: str, card: Mapping[str, Any]) -> str | Quantization | None:
    """The `quantize` argument of `load_model` for a setting of `HeldIn`."""
    if asked == "as-trained":
        return quantization_on(card)
    return None if asked == "none" else asked
