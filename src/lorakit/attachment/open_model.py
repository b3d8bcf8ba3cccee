"""A base model, with an adapter if there is one, ready to be used as the adapter was trained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import transformers

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.attachment.attach import attach
from lorakit.attachment.attached import attached
from lorakit.attachment.state import attachment_of
from lorakit.config.answering import EvaluateConfig, GenerateConfig
from lorakit.config.base import Settings
from lorakit.config.train import DataConfig
from lorakit.errors import ConfigError, ModelError
from lorakit.models.load import labels_of, load_model, task_of

ModelSource = str | os.PathLike[str] | transformers.PreTrainedModel
"""Whatever stands for a base: its packaged name, folder or hub id, or the loaded model."""


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
    source: AdapterSource | None = None,
    *,
    model: str | None = None,
    dtype: str = "float32",
    task: str | None = None,
    data: DataConfig | None = None,
    quantize: str = "as-trained",
    allow_other_base: bool = False,
) -> Opened:
    """A base with an adapter attached, or the base alone.

    Args:
        source: the adapter, its folder, or its hub id; None: no adapter.
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
    adapter = None if source is None else Adapter.of(source)
    card: Mapping[str, Any] = adapter.card if adapter else {}
    merged, task = _data(card, data), task or card.get("task") or "generation"
    labels = merged.labels or card.get("labels")
    labels = tuple(labels) if labels and task == "classification" else None
    if adapter is not None:
        loaded, tokenizer = adapter.load_base(
            model, dtype=dtype, task=task, labels=labels, quantize=quantize
        )
        attach(loaded, adapter, allow_other_base=allow_other_base)
    elif model:
        way = None if quantize in ("none", "as-trained") else quantize
        loaded, tokenizer = load_model(model, dtype=dtype, task=task, labels=labels, quantize=way)
    else:
        raise ConfigError("give an adapter, a model, or both")
    return Opened(
        model=loaded, tokenizer=tokenizer, adapter=adapter, task=task, labels=labels, data=merged
    )


@contextmanager
def opened_model(
    config: GenerateConfig | EvaluateConfig,
    source: AdapterSource | None,
    model: ModelSource | None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    *,
    task: str | None = None,
    data: DataConfig | None = None,
) -> Iterator[Opened]:
    """A model for a block of work: opened by name, or a loaded one, which is then as it was.

    Args:
        config: how to load a base, and whether it may be another than the adapter's.
        source: the adapter, or its folder. None: no adapter; of a loaded model that in use.
        model: a name as `open_model` takes it, or a loaded model.
        tokenizer: that of a loaded model.
        task: what the model does.
        data: what differs from the adapter's training in how rows are read.

    Raises:
        ConfigError: a setting goes with a name alone, or a loaded model does another task.
        ModelError: a loaded model without its tokenizer.
        LorakitError: as `open_model` does.
    """
    other_base = config.allow_other_base
    if not isinstance(model, str | os.PathLike | None):
        check_loaded(model, tokenizer, config)
        assert tokenizer is not None
        with _borrowed(source, model, tokenizer, task, data, other_base) as opened:
            yield opened
        return
    if tokenizer is not None:
        raise ConfigError(f"a tokenizer goes with a loaded model, and model is {model!r}")
    yield open_model(
        source,
        model=None if model is None else os.fspath(model),
        dtype=config.dtype,
        task=task,
        data=data,
        quantize=config.quantize,
        allow_other_base=other_base,
    )


@contextmanager
def _borrowed(
    source: AdapterSource | None,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    task: str | None,
    data: DataConfig | None,
    allow_other_base: bool,
) -> Iterator[Opened]:
    adapter = _active(model) if source is None else Adapter.of(source)
    card: Mapping[str, Any] = adapter.card if adapter else {}
    own = task_of(model)
    asked = task or card.get("task") or own
    if asked != own:
        raise ConfigError(f"the task is {asked}, and the loaded model does {own}")
    training = model.training
    with (
        nullcontext()
        if source is None or adapter is None
        else attached(model, adapter, allow_other_base=allow_other_base)
    ):
        try:
            yield Opened(
                model=model.eval(),
                tokenizer=tokenizer,
                adapter=adapter,
                task=own,
                labels=labels_of(model) if own == "classification" else None,
                data=_data(card, data),
            )
        finally:
            model.train(training)


LOADING = ("dtype", "quantize", "double_quantization")
"""The settings that say how a base is loaded."""


def check_loaded(model: object, tokenizer: object, config: Settings) -> None:
    """Make sure that these are a loaded model and its tokenizer, and that no setting loads one.

    Raises:
        ModelError: one of them is missing, or something else.
        ConfigError: there are such settings.
    """
    hint = "as in model, tokenizer = lk.load_model(…)"
    if not isinstance(model, transformers.PreTrainedModel):
        found = type(model).__name__
        raise ModelError(f"a model is given by name or as a loaded model, {hint}; found a {found}")
    if tokenizer is None:
        raise ModelError(f"a loaded model needs its tokenizer: give tokenizer too, {hint}")
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        found = type(tokenizer).__name__
        raise ModelError(f"tokenizer is that of the model, {hint}; found a {found}")
    given = [name for name in LOADING if name in config.model_fields_set]
    if given:
        which = f"{' and '.join(given)} {'is that' if len(given) == 1 else 'are those'}"
        raise ConfigError(f"{which} of a base which is loaded by name: leave it out")


def _active(model: transformers.PreTrainedModel) -> Adapter | None:
    """The adapter that is in use in a model, without its tensors."""
    state = attachment_of(model)
    name = None if state is None else state.route.frame.name
    return None if state is None or name is None else state.adapters[name].record


def _data(card: Mapping[str, Any], given: DataConfig | None) -> DataConfig:
    """How rows are read: as in training, where nothing else is given."""
    trained, given = DataConfig(**card.get("data", {})), given or DataConfig()
    return trained.model_copy(update={k: getattr(given, k) for k in given.model_fields_set})
