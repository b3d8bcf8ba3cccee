"""A base model, with an adapter if there is one, ready to be used as the adapter was trained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import transformers

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.adapter.card import TrainedUse
from lorakit.attachment.attach import attach
from lorakit.attachment.attached import attached
from lorakit.attachment.state import attachment_of
from lorakit.config.answering import EvaluateConfig, GenerateConfig
from lorakit.config.base import Settings
from lorakit.config.train import DataConfig
from lorakit.data.chat import with_template
from lorakit.data.labels import head_classes
from lorakit.errors import AdapterFileError, ConfigError, ModelError
from lorakit.models.load import (
    fresh_heads,
    labels_of,
    load_model,
    own_classes,
    own_task,
    task_of,
)
from lorakit.models.tasks import has_classes

ModelSource = str | os.PathLike[str] | transformers.PreTrainedModel
"""Whatever stands for a base: its packaged name, folder or hub id, or the loaded model."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to use, and how to talk to it."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    """The base's, with the adapter's own chat template, if it has one."""
    base_template: Any
    """The base's chat template, or several by name; None: it has none."""
    adapter: Adapter | None
    """The adapter attached to the model; None: the model is the base."""
    task: str
    """What the model does, as the setting of that name."""
    labels: tuple[str, ...] | None
    """Names of the classes, for a classifier."""
    data: DataConfig
    """How rows become prompts: as in training, where the caller says nothing else."""

    @classmethod
    def of(
        cls,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        adapter: Adapter | None,
        *,
        use: TrainedUse,
        task: str,
        labels: tuple[str, ...] | None,
        data: DataConfig,
    ) -> Opened:
        """A model with its base's tokenizer, which gets the chat template of the adapter's card."""
        return cls(
            model=model,
            tokenizer=with_template(tokenizer, use.chat_template),
            base_template=tokenizer.chat_template,
            adapter=adapter,
            task=task,
            labels=labels,
            data=data,
        )


def open_model(
    source: AdapterSource | None = None,
    *,
    model: str | None = None,
    dtype: str = "float32",
    task: str | None = None,
    data: DataConfig | None = None,
    quantize: str = "as-trained",
    device: str | None = None,
    allow_other_base: bool = False,
) -> Opened:
    """A base with an adapter attached, or the base alone.

    Args:
        source: the adapter, its folder, or its hub id; None: no adapter.
        model: the base. None: the one that the adapter names.
        dtype: precision of the base.
        task: what the model does. None: what the adapter was trained for, else what the base is.
        data: what differs from the adapter's training in how rows are read.
        quantize: how the base holds its weights: as-trained (as the adapter's card says; without an
            adapter, in `dtype`), none (in `dtype`), 4bit or 8bit.
        device: what both compute on, as in `load_model`; None: the CPU.
        allow_other_base: accept a base with other weights.

    Raises:
        ConfigError: neither an adapter nor a model is given, or the device is not there.
        AdapterFileError: the adapter's files are unusable, name no base, or do not fit it.
        ModelError: the base cannot be found, or has no head for the task.
        MissingExtraError: the base is to be quantised, and the library for it is not installed.
    """
    adapter = None if source is None else Adapter.of(source)
    card = adapter.card if adapter else {}
    base = model or (adapter.base_name if adapter else "")
    if not base and adapter is None:
        raise ConfigError("give an adapter, a model, or both")
    if not base:
        raise AdapterFileError(
            "the adapter does not say which base it was trained on: name the model"
        )
    use = TrainedUse.on(card)
    task = task or use.task or own_task(base)
    merged = _data(use, data)
    labels = _classes(base, use, merged, task) if has_classes(task) else None
    how: dict[str, Any] = {"dtype": dtype, "task": task, "labels": labels, "device": device}
    if adapter is not None:
        loaded, tokenizer = adapter.load_base(base, quantize=quantize, **how)
    else:
        way = None if quantize in ("none", "as-trained") else quantize
        loaded, tokenizer = load_model(base, quantize=way, **how)
    check_head(loaded, adapter, base, task)
    if adapter is not None:
        attach(loaded, adapter, allow_other_base=allow_other_base)
    return Opened.of(loaded, tokenizer, adapter, use=use, task=task, labels=labels, data=merged)


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
        device=config.device,
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
    use = TrainedUse.on(adapter.card if adapter else {})
    own = task_of(model)
    asked = task or use.task or own
    if asked != own:
        raise ConfigError(f"the task is {asked}, and the loaded model does {own}")
    read, labels = _data(use, data), None
    if has_classes(own):
        labels = head_classes(read.labels, labels_of(model), whose="the loaded model")
    training = model.training
    with (
        nullcontext()
        if source is None or adapter is None
        else attached(model, adapter, allow_other_base=allow_other_base)
    ):
        try:
            model.eval()
            yield Opened.of(model, tokenizer, adapter, use=use, task=own, labels=labels, data=read)
        finally:
            model.train(training)


LOADING = ("dtype", "quantize", "double_quantization", "device")
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


def _classes(base: str, use: TrainedUse, data: DataConfig, task: str) -> tuple[str, ...] | None:
    """The names of the classes in the order of the head: an adapter's, or else the base's own."""
    if use.labels:
        return head_classes(data.labels, use.labels, whose="the adapter")
    return head_classes(data.labels, own_classes(base, task), whose=base)


def check_head(
    model: transformers.PreTrainedModel, adapter: Adapter | None, base: str, task: str
) -> None:
    """Make sure that a task's head comes from the base or the adapter.

    Raises:
        ModelError: neither has it, so that what it answers would be random.
    """
    tensors = adapter.tensors if adapter else {}
    lacking = [
        path
        for path in fresh_heads(model)
        if not any(name.startswith(f"{path}.") for name in tensors)
    ]
    if lacking:
        who = f"{base} has" if adapter is None else f"{base} and the adapter have"
        raise ModelError(
            f"{who} no head for {task} ({', '.join(lacking)}), so the answers would be random: give"
            " an adapter that was trained for it"
        )


def _data(use: TrainedUse, given: DataConfig | None) -> DataConfig:
    """How rows are read: as in training, where nothing else is given."""
    given = given or DataConfig()
    return use.data.model_copy(update={k: getattr(given, k) for k in given.model_fields_set})
