"""A base that is loaded already, for a block in which it is trained on; then it is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.attachment.attach import detach
from lorakit.attachment.attached import use_again
from lorakit.attachment.open_model import check_loaded
from lorakit.attachment.state import adapter_names, attachment_of
from lorakit.config.train import TrainConfig
from lorakit.data.labels import are_unnamed
from lorakit.errors import ConfigError
from lorakit.layers.route import Frame
from lorakit.models.base import base_parameters
from lorakit.models.load import fresh_heads, labels_of, model_name, task_of
from lorakit.models.tasks import has_classes


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A loaded model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def settings(self, config: TrainConfig) -> TrainConfig:
        """The settings of a run with those that name the base as this one is."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        name = model_name(self.model) or "a loaded model"
        return config.model_copy(update={"model": name, "dtype": dtype, "quantize": None})

    def classes(self) -> tuple[str, ...] | None:
        """The names of its classes, in the order of its head; None: any will do."""
        if not has_classes(task_of(self.model)):
            return None
        names = labels_of(self.model)
        return None if fresh_heads(self.model) and are_unnamed(names) else names

    def check_task(self, task: str, labels: tuple[str, ...] | None) -> None:
        """Make sure that the model does the task of the rows.

        Raises:
            ConfigError: it does another one, or has other classes.
        """
        own = task_of(self.model)
        if own != task:
            raise ConfigError(
                f"the rows are for {task}, and the loaded model does {own}: "
                f"lk.load_model(…, task={task!r}) loads it for them"
            )
        names = labels_of(self.model) if has_classes(task) else None
        if labels != names and not (
            are_unnamed(names or ()) and len(names or ()) == len(labels or ())
        ):
            raise ConfigError(
                f"the rows have the classes {', '.join(labels or ())}, and the loaded model's are "
                f"{', '.join(names or ())}: data.labels names those of the model in its order"
            )


def settled(config: TrainConfig, base: LoadedBase | None) -> TrainConfig:
    """The settings of a run with the name and precision of its base as they are.

    Args:
        config: the settings of the run.
        base: the base, if it is loaded already.
    """
    if base is not None:
        return base.settings(config)
    if config.dtype == "auto":
        return config.model_copy(update={"dtype": "bfloat16" if _is_half_fast() else "float32"})
    return config


def _is_half_fast() -> bool:
    """Whether matmuls in bfloat16 are at least as fast as in float32.

    Without AVX-512 torch's are about 5 times as slow, and 16 times in the backward pass.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@contextmanager
def borrowed(
    config: TrainConfig,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[LoadedBase | None]:
    """A loaded model inside a block; afterwards its adapters, modes, device and head are as before.

    Yields:
        None, if no model is given: the settings name one.

    Raises:
        ModelError: the tokenizer is missing, or it is no loaded model.
        ConfigError: a setting says how to load a base.
    """
    if model is None and tokenizer is None:
        yield None
        return
    check_loaded(model, tokenizer, config)
    assert model is not None
    assert tokenizer is not None
    names, state = adapter_names(model), attachment_of(model)
    frame = Frame() if state is None else state.route.frame
    modes = {module: module.training for module in model.modules()}
    device, heads = model.device, _fresh_heads(model)
    # With adapters in it, nothing of the base is trained; without, lorakit keeps what was.
    trained = [each for each in model.parameters() if names and each.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield LoadedBase(model=model, tokenizer=tokenizer)
    finally:
        for name in adapter_names(model):
            if name not in names:
                detach(model, name)
        use_again(model, frame)
        for module, training in modes.items():
            module.training = training
        if model.device != device:
            cast(nn.Module, model).to(device)
        for parameter in trained:
            parameter.requires_grad_()
        for parameter, values in heads:
            parameter.data.copy_(values)


def _fresh_heads(model: PreTrainedModel) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters that a run draws anew, and their values."""
    heads = [model.get_submodule(path) for path in fresh_heads(model)]
    return [(each, each.detach().clone()) for head in heads for _, each in base_parameters(head)]
