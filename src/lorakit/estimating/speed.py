"""How fast a device multiplies and copies, by a measurement of about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LEAST_S = 0.2
"""Seconds for which each of the two is measured at least."""
COPIED = 2**24
"""Values that are added at once: more than caches hold."""
OPERATION_S = {"cpu": 8e-6, "cuda": 6e-6}
"""Seconds that torch takes for an operation of any size, by the kind of device."""


@dataclass(frozen=True, kw_only=True)
class DeviceSpeed:
    """What a device does in a second."""

    flops: float
    """FLOPs of matmuls in the precision of the base."""
    bytes: float | None = None
    """Read and written by other operations; None: not known, and left out."""
    operation_s: float = 0.0
    """Seconds of one operation, however small."""

    def seconds_of(self, *, flops: float, moved_bytes: float, operations: int) -> float:
        """The time of a step."""
        moving = 0.0 if self.bytes is None else moved_bytes / self.bytes
        return flops / self.flops + moving + operations * self.operation_s


def measured_speed(
    dtype: torch.dtype, *, device: str, rows: int, width: int, columns: int
) -> DeviceSpeed:
    """The speed of a device that is here.

    Args:
        dtype: precision of the base.
        device: cpu or cuda.
        rows: tokens of a batch.
        width: columns of the base's usual weight, d_in.
        columns: its rows, d_out.
    """
    with torch.inference_mode():
        x = torch.ones(rows, width, dtype=dtype, device=device)
        weight = torch.ones(columns, width, dtype=dtype, device=device)
        multiply = _seconds(lambda: x @ weight.T, device)
        values = torch.ones(COPIED, device=device)
        add = _seconds(lambda: values.add(1.0), device)
    return DeviceSpeed(
        flops=2 * rows * width * columns / multiply,
        bytes=2 * values.nbytes / add,
        operation_s=OPERATION_S[device],
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """The fastest of several runs, after one that warms up."""
    work()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < LEAST_S or best == float("inf"):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
