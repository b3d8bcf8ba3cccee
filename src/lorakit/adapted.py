"""A base model, with an adapter if there is one, ready to be used as the adapter was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import transformers

from lorakit.adapter import Adapter
from lorakit.attach import attach
from lorakit.config import DataConfig
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.models.load import load_model


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
    allow_other_base: bool = False,
) -> Opened:
    """Return a base with the adapter attached that a folder holds, or the base alone.

    Args:
        adapter_path: the adapter's folder; None: no adapter.
        model: the base. None: the one that the adapter names.
        dtype: precision of the base.
        task: what the model does. None: what the adapter was trained for, else generation.
        data: what differs from the adapter's training in how rows are read.
        allow_other_base: accept a base with other weights.

    Raises:
        ConfigError: neither an adapter nor a model is given.
        AdapterFileError: the adapter's files are unusable, name no base, or do not fit it.
        ModelError: the base cannot be found.
    """
    adapter = None if adapter_path is None else Adapter.load(adapter_path)
    card = adapter.card if adapter else {}
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
    loaded, tokenizer = load_model(base, dtype=dtype, task=task, labels=labels)
    if adapter is not None:
        attach(loaded, adapter, allow_other_base=allow_other_base)
    return Opened(
        model=loaded, tokenizer=tokenizer, adapter=adapter, task=task, labels=labels, data=merged
    )
