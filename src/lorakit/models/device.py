"""What a model computes on: the device that a word of the setting means, and the way there."""

from __future__ import annotations

from typing import get_args

import torch
from transformers import PreTrainedModel

from lorakit.config.base import Device
from lorakit.errors import ConfigError, ModelError
from lorakit.models.quantized import base_tensors


def gpu_is_seen() -> bool:
    """Whether torch can compute on a GPU here."""
    return torch.cuda.is_available()


def device_for(word: str) -> torch.device:
    """The device that a word means here: auto, cpu or cuda.

    Raises:
        ConfigError: it is another word, or cuda where torch sees no GPU.
    """
    if word not in get_args(Device):
        raise ConfigError(f"device {word!r} is none of {', '.join(get_args(Device))}")
    if word == "cuda" and not gpu_is_seen():
        raise ConfigError(
            f"device is cuda, and torch {torch.__version__} sees no GPU here: give auto or cpu, or "
            "install a build of torch for CUDA on a machine with a GPU"
        )
    return torch.device("cuda" if word != "cpu" and gpu_is_seen() else "cpu")


def move(model: PreTrainedModel, device: torch.device) -> None:
    """Have a base without adapters compute on a device, also one that is held in few bits.

    Raises:
        ModelError: the device has too little memory.
    """
    try:
        # Torch's types know the method of a plain module alone.
        model.to(device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        size = sum(each.nbytes for each in base_tensors(model)) / 1e9
        raise ModelError(
            f"{type(model).__name__} takes {size:,.1f} GB, and the GPU has no room for it: give "
            "device cpu, hold it in fewer bits (dtype, quantize), or end what else is on the GPU"
        ) from error
