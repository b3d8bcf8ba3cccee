"""The device that tensors without values stand for, where a computation is only traced.

Paths and sizes of chunks depend on the device. On the meta device they are those of the device that
the trace is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

DeviceKind = Literal["cpu", "cuda"]

_STANDS_FOR: ContextVar[DeviceKind] = ContextVar("stands_for", default="cpu")


@contextmanager
def standing_for(kind: DeviceKind) -> Iterator[None]:
    """Let tensors on the meta device stand for ones on another, inside a block."""
    before = _STANDS_FOR.set(kind)
    try:
        yield
    finally:
        _STANDS_FOR.reset(before)


def kind_of_device(x: Tensor) -> str:
    """The kind of device that a tensor is on, or stands for."""
    return _STANDS_FOR.get() if x.is_meta else x.device.type


def seeded(device: torch.device, seed: int) -> torch.Generator | None:
    """A generator of random numbers on a device; None where nothing is computed."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def with_values(device: torch.device) -> torch.device:
    """Where numbers are computed that decide shapes on a device: there, if it has values."""
    return torch.device("cpu") if device.type == "meta" else device
