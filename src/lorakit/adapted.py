"""A base model together with its adapter, from the adapter's folder alone."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter import Adapter
from lorakit.attach import attach
from lorakit.config import DataConfig
from lorakit.errors import AdapterFileError
from lorakit.models.load import load_model


def load_adapted(
    path: str | Path,
    *,
    model: str | None = None,
    dtype: str = "float32",
    allow_other_base: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Adapter]:
    """Return the base that an adapter was trained on, with the adapter attached.

    Args:
        path: the adapter's folder.
        model: the base, where it has another name here than when the adapter was trained.
        dtype: precision of the base.
        allow_other_base: accept a base with other weights.

    Raises:
        AdapterFileError: the files are unusable, name no base, or do not fit it.
        ModelError: the base cannot be found.
    """
    adapter = Adapter.load(path)
    base = model or (adapter.base.name if adapter.base else "")
    if not base:
        raise AdapterFileError(f"{path} does not say which base it was trained on: name the model")
    labels = adapter.card.get("labels")
    loaded, tokenizer = load_model(
        base, dtype=dtype, task=adapter.card.get("task", "generation"), labels=labels
    )
    attach(loaded, adapter, allow_other_base=allow_other_base)
    return loaded, tokenizer, adapter


def data_of(adapter: Adapter) -> DataConfig:
    """Return how the adapter's training rows were read: its separator, fields and lengths."""
    return DataConfig(**adapter.card.get("data", {}))
