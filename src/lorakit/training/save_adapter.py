"""A callback by which other people's Trainers save and resume an adapter, not the whole model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from lorakit.adapter.atomic_write import write_files
from lorakit.attachment.attach import adapter_parameters, extract
from lorakit.attachment.model_methods import GuardedMethod
from lorakit.attachment.state import given_or_active, require_attachment
from lorakit.errors import TrainingError


class SaveAdapter(TrainerCallback):
    """Has a Trainer that others wrote save and resume the adapter alone of its model.

    It is for transformers' Trainer and for what is built on it, such as TRL's. Each checkpoint is
    an adapter folder beside Trainer's own state, which `resume_from_checkpoint` and
    `load_best_model_at_end` read; at the end the adapter is in `output_dir`. Until it is detached,
    `model.save_pretrained`, and so `trainer.save_model`, write the adapter in place of the model.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> plan = lk.attach(model, lk.LoRAConfig(rank=8))
        >>> settings = TrainingArguments("out/other", use_cpu=True)
        >>> trainer = Trainer(model, settings, callbacks=[lk.SaveAdapter()])
        >>> trainer.save_model("out/other/now")
        >>> lk.Adapter.load("out/other/now").parameters
        460800
    """

    def __init__(self, name: str | None = None) -> None:
        """Save an adapter by the name it was attached by; None: the one in use, or the only one.

        Raises (when a Trainer is made with it):
            AttachError: the Trainer's model has no adapter.
        """
        self._name = name

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the model save the adapter from now on."""
        save_adapter_alone(kwargs["model"], self._name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same, for a callback that was added to a Trainer later."""
        save_adapter_alone(kwargs["model"], self._name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter as it is in the end."""
        if state.is_world_process_zero and args.output_dir is not None:
            extract(kwargs["model"], self._name).save(args.output_dir, overwrite=True)


def save_adapter_alone(model: nn.Module, name: str | None = None) -> None:
    """Have `save_pretrained` write an adapter in place of the model, until it is detached.

    Args:
        model: with the adapter.
        name: that it was attached by; None: the one in use, or the only one.

    Raises:
        AttachError: the model has no adapter of this name.
    """
    attached = require_attachment(model)
    if name is None and len(attached.adapters) == 1:
        # Also inside a route to the base, where a Trainer asks the reference of preferences.
        (name,) = attached.adapters
    name = given_or_active(model, name)
    hooks, own = attached.hooks, frozenset(_trained(model, name))
    method = hooks.get("save_pretrained")
    if isinstance(method, GuardedMethod):
        method.instead = partial(_save, name=name)
    if "load_state_dict" not in hooks:
        hooks["load_state_dict"] = model.register_load_state_dict_post_hook(
            partial(_check_loaded, own=own)
        )


def _trained(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the model's `state_dict`."""
    own = {id(parameter) for _, parameter in adapter_parameters(model, name)}
    return {path: each for path, each in model.named_parameters() if id(each) in own}


def _save(
    model: nn.Module,
    folder: str,
    *args: Any,
    name: str,
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Write an adapter's folder, and its tensors by the names that a Trainer loads."""
    if not is_main_process:
        return
    extract(model, name).save(folder, overwrite=True)
    tensors = {
        path: each.detach().cpu().contiguous() for path, each in _trained(model, name).items()
    }
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_files(Path(folder), {SAFE_WEIGHTS_NAME: content}, overwrite=True)


def _check_loaded(model: nn.Module, keys: Any, *, own: frozenset[str]) -> None:
    """Look at what `load_state_dict` found: in an adapter's file nothing of the base is missing.

    Raises:
        TrainingError: the file is of an adapter of other layers.
    """
    missing = set(keys.missing_keys)
    if not model.state_dict().keys() - own <= missing:
        return
    problems = [f"{path}  is not in the checkpoint" for path in sorted(own & missing)]
    problems += [f"{path}  is not in the model" for path in keys.unexpected_keys]
    if problems:
        raise TrainingError.listing("the checkpoint is of another adapter", problems)
    keys.missing_keys.clear()
