"""Parts of the low-rank updates of a batch's rows: buffers, kept down-projections, bias shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.methods.lora.lora import LowRank, matrix_shape, positions
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.models.base import device_of
from lorakit.upstream.private_names import write_count


@torch.no_grad()
def write_sum(a: Tensor, b: Tensor, terms: Iterable[tuple[LowRank, float]]) -> None:
    """Write the weighted sum of updates into buffers: A (rank, d_in) and scale·Bᵀ (rank, d_out).

    B is zero for the ranks that are left, and beside the rows of a slice.
    """
    start = 0
    for part, weight in terms:
        stop = start + part.site.rank
        a[start:stop] = part.a
        scaled = part.b.mT.to(b.dtype) * (part.site.scale * weight)
        if part.site.rows is None:
            b[start:stop] = scaled
        else:
            b[start:stop] = 0
            b[start:stop].index_copy_(1, positions(part.site.rows, b.device), scaled)
        start = stop
    b[start:] = 0


class KeptProjection:
    """The down-projection of an input that several layers read, kept until the last has used it.

    The input is recognised by its identity, as long as nothing was written into it.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._kept: tuple[Tensor, Any, Tensor] | None = None
        self._waiting = 0

    def of(self, x: Tensor, project: Callable[[], Tensor]) -> Tensor:
        """The projection of an input: the kept one, or else what `project` returns."""
        # Torch counts no writes in inference mode.
        state = torch.is_grad_enabled(), None if x.is_inference() else write_count(x)
        kept = self._kept
        if kept is None or kept[0] is not x or kept[1] != state:
            kept = (x, state, project())
            self._waiting = self._layers
        self._waiting -= 1
        self._kept = kept if self._waiting else None
        return kept[2]


def add_to_rows(output: Tensor, shifts: Tensor) -> Tensor:
    """An output, (rows·k, …, d_out), with each row's shift (rows, d_out) added."""
    rows = output.unflatten(0, (len(shifts), -1))
    shifts = shifts.to(output.dtype).reshape(len(shifts), *[1] * (rows.dim() - 2), -1)
    return (rows + shifts).flatten(0, 1)


def bias_shifts(
    layer: nn.Module,
    terms: Sequence[Sequence[tuple[LoRAUpdate, float]]],
    dtype: torch.dtype,
) -> Tensor:
    """What updates add to a layer's bias, (1 + combinations, d_out): first zero, for the base.

    Args:
        layer: the adapted layer.
        terms: for each combination, the updates and their weights.
        dtype: the precision of the result.
    """
    nothing = torch.zeros(matrix_shape(layer)[0], dtype=dtype, device=device_of(layer))
    return torch.stack([nothing, *(nothing + bias_shift(layer, own) for own in terms)])


def bias_shift(layer: nn.Module, terms: Iterable[tuple[LoRAUpdate, float]]) -> Tensor | float:
    """The weighted sum of what updates add to a layer's bias, (d_out,); 0: nothing."""
    shifts = ((update.shift(layer), weight) for update, weight in terms)
    return sum((shift * weight for shift, weight in shifts if shift is not None), start=0.0)
