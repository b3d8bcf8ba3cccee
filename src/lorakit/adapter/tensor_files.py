"""Files of named tensors, safetensors or pickles: read without running any code in them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lorakit.adapter.file_sizes import unpacked_problem
from lorakit.errors import AdapterFileError

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
"""The weights file of older versions of PEFT, a pickle."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_tensors(files: Mapping[str, bytes], problems: list[str]) -> dict[str, Tensor]:
    """The tensors of an adapter folder; none if they cannot be read.

    Args:
        files: content by name, with `WEIGHTS_FILE` or `PICKLE_FILE` among them.
        problems: gets a line if they cannot be read, and one for each value problem.
    """
    try:
        if WEIGHTS_FILE in files:
            tensors = read_safetensors(files[WEIGHTS_FILE], WEIGHTS_FILE)
        else:
            tensors = read_pickle(files[PICKLE_FILE], PICKLE_FILE)
    except AdapterFileError as error:
        problems.append(str(error))
        return {}
    problems += value_problems(tensors)
    return tensors


def read_safetensors(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        data: the whole file.
        name: what to call it in a message.

    Raises:
        AdapterFileError: it is truncated, or not a safetensors file.
    """
    try:
        return safetensors.torch.load(data)
    # The bytes may be anything, and so may what the parser makes of them.
    except Exception as error:
        raise AdapterFileError(
            f"{name} is not a readable safetensors file: {error}; was it cut off or damaged?"
        ) from error


def read_pickle(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote; code in it is never run.

    Args:
        data: the whole file.
        name: what to call it in a message.

    Raises:
        AdapterFileError: it is damaged, holds more than tensors, or would run code.
    """
    if (problem := unpacked_problem(data)) is not None:
        raise AdapterFileError(f"{name} cannot be read: {problem}")
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # The bytes may be anything, and so may what the unpickler makes of them.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AdapterFileError(
            f"{name} cannot be read as tensors alone, and nothing else in it is run: {reason}"
        ) from error
    # loralib's own training script puts the tensors one level down.
    if isinstance(loaded, Mapping) and set(loaded) == {"model_state_dict"}:
        loaded = loaded["model_state_dict"]
    return _flat(loaded, name)


def _flat(loaded: Any, name: str) -> dict[str, Tensor]:
    found = loaded.items() if isinstance(loaded, Mapping) else ()
    wide = [key for key, tensor in found if isinstance(tensor, Tensor) and _is_spread(tensor)]
    if wide:
        raise AdapterFileError(f"{name}  {wide[0]} has a larger shape than values in the file")
    tensors = {
        key: tensor.detach().contiguous()
        for key, tensor in found
        if isinstance(key, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
    }
    if not tensors or len(tensors) != len(found):
        raise AdapterFileError(f"{name} is not a flat dictionary of names and tensors")
    return tensors


def _is_spread(tensor: Tensor) -> bool:
    """Whether a tensor repeats its values in memory: contiguous, it may be of any size."""
    strided = tensor.layout == torch.strided and not tensor.is_meta
    return strided and tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()


def value_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor that is not floating point, or not finite."""
    problems = []
    floats = {name: tensor for name, tensor in tensors.items() if tensor.dtype in FLOATS}
    for name in sorted(tensors.keys() - floats.keys()):
        kind = str(tensors[name].dtype).removeprefix("torch.")
        problems.append(f"{name}  is {kind}; float32, bfloat16, float16 or float64 expected")
    for name in sorted(_suspects(floats)):
        count = int((~torch.isfinite(floats[name])).sum())
        if count:
            total = floats[name].numel()
            problems.append(f"{name}  holds NaN or infinity in {count:,} of {total:,}")
    return problems


def _suspects(tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors whose sum is not finite: those with NaN or infinity, and huge ones."""
    # One pass over the values; looking at each of them takes three times as long.
    sums = torch.tensor([tensor.sum(dtype=torch.float32) for tensor in tensors.values()])
    return [
        name for name, fine in zip(tensors, torch.isfinite(sums).tolist(), strict=True) if not fine
    ]
