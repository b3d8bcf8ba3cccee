"""The original weights of a merged model: copies in memory, or their places in the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorakit.errors import MergeError
from lorakit.models.base import base_parameter
from lorakit.upstream.private_names import loaded_from


class FileWeight:
    """An original weight that is read from its checkpoint file when it is needed."""

    def __init__(self, handle: Any, name: str, checksum: str) -> None:
        self._handle = handle
        self._name = name
        self._checksum = checksum

    def read(self) -> Tensor:
        """The weight.

        Raises:
            MergeError: somebody has changed the file meanwhile.
        """
        weight: Tensor = self._handle.get_tensor(self._name)
        if checksum_of(weight) != self._checksum:
            raise MergeError(
                f"the checkpoint file has changed since {self._name} was merged: load the base anew"
            )
        return weight

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle cannot share the open file, so it holds the weight itself.
        return torch.clone, (self.read(),)


def checksum_of(weight: Tensor) -> str:
    """The SHA-256 of a weight's bits."""
    bits = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).hexdigest()


class Checkpoint:
    """The safetensors files that a model was loaded from, as a source of original weights."""

    def __init__(self, model: nn.Module) -> None:
        folder = Path(loaded_from(model) or ".")
        files = sorted(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else []
        handles = [safe_open(file, framework="pt") for file in files]
        self._where = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118

    def holds(self, name: str, current: Tensor) -> FileWeight | None:
        """The weight in the file if it has the same bits as the model's."""
        handle = self._where.get(name)
        if handle is None:
            return None
        found: Tensor = handle.get_tensor(name)
        if found.dtype != current.dtype or not torch.equal(found, current.detach().cpu()):
            return None
        return FileWeight(handle, name, checksum_of(found))


OriginalWeight = Tensor | FileWeight
"""A weight before the merge: a copy, the parameter itself if it was tied, or a place in a file."""


def restore_module(model: nn.Module, path: str, weights: Mapping[str, OriginalWeight]) -> None:
    """Copy a module's original weights back, and tie again those that the merge untied."""
    module = model.get_submodule(path)
    for name, original in weights.items():
        if isinstance(original, nn.Parameter):
            # The model may have been moved or cast since; the parameter stays the same object.
            original.data = original.data.to(base_parameter(module, name))
            set_parameter(module, name, original)
        else:
            weight = original if isinstance(original, Tensor) else original.read()
            base_parameter(module, name).data.copy_(weight)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter of a dotted name by another."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
