"""How the rows of a mixed batch are grouped by adapter: decided once per route, not per layer."""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from lorakit.errors import ConfigError, MissingExtraError, RouteError
from lorakit.kernels import choice

Kernels = Literal["auto", "plain", "triton"]

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A group reads its weights once; each of its rows costs half of that.
_GROUP_COST, _ROW_COST = 1.0, 0.5


@dataclass(frozen=True, eq=False)
class Grouping:
    """Rows in groups: each group has one adapter and the same number of rows; see `group_rows`.

    All tensors are int64, on the device of the batch.
    """

    index_of_row: tuple[int, ...]
    """The index of each row's adapter in the stacked weights; -1: none."""
    rows_per_group: int
    """Rows of each group."""
    groups: int
    """Number of groups; 0 where no row has an adapter."""
    index_of_group: Int[Tensor, " groups"] | None
    """The index of each group's adapter; None: group i has adapter i."""
    order: Int[Tensor, " places"] | None
    """The row at each position of the groups; None: the rows' own order. A group that is not full
    repeats one of its own rows, so that no row is multiplied with another adapter's weights."""
    back: Int[Tensor, " adapted"] | None
    """The position of each row with an adapter; None: the rows' own order."""
    adapted: Int[Tensor, " adapted"] | None
    """The rows with an adapter, in ascending order; None: all rows."""
    kernels: Literal["plain", "triton"]
    """What computes: plain torch, or the Triton kernels."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.index_of_row)

    def per_row(self, x: Tensor) -> int:
        """The tokens of each row in an input (rows·k, …, d).

        Raises:
            RouteError: the batch has another number of rows than the route.
        """
        if x.shape[0] % self.rows:
            shared = "; a layer whose input all rows share can't answer them differently"
            raise RouteError(
                f"the route is for {self.rows} rows, but the batch has {x.shape[0]}"
                + (shared if x.shape[0] == 1 else "")
            )
        return x.shape[:-1].numel() // self.rows


def group_rows(
    index_of_row: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "auto",
) -> Grouping:
    """Group the rows of a batch.

    Args:
        index_of_row: the index of each row's adapter in the stacked weights; -1: none.
        device: where the batch is.
        dtype: precision of the stacked weights, which is the precision of the update.
        kernels: what computes. auto: Triton where it can, which is a CUDA device and weights of at
            most 32 bits, unless `choice.use` says plain; else plain torch.

    Raises:
        MissingExtraError: Triton was asked for by name, and is not installed.
        ConfigError: it was asked for by name where it cannot work.
    """
    assert index_of_row, "a batch has at least one row"
    assert min(index_of_row) >= -1
    device = torch.device(device)
    groups = _grouped_rows(index_of_row)
    index_of_group = [index_of_row[group[0]] for group in groups]
    order = [row for group in groups for row in group]
    adapted = [row for row, adapter in enumerate(index_of_row) if adapter >= 0]
    place = {row: place for place, row in enumerate(order)}

    def index(values: list[int], size: int) -> Tensor | None:
        return None if values == list(range(size)) else torch.tensor(values, device=device).long()

    return Grouping(
        index_of_row=tuple(index_of_row),
        rows_per_group=len(groups[0]) if groups else 1,
        groups=len(groups),
        index_of_group=index(index_of_group, len(groups)),
        order=index(order, len(index_of_row)),
        back=index([place[row] for row in adapted], len(order)),
        adapted=index(adapted, len(index_of_row)),
        kernels=choose_kernels(kernels, device, dtype),
    )


def _grouped_rows(index_of_row: Sequence[int]) -> list[list[int]]:
    """The rows of each group, in the order of the groups' first rows.

    This order leaves rows with distinct adapters in their order. Ordering groups by adapter would
    avoid gathering weights once per route, and need gathering rows in every layer.
    """
    rows_of: dict[int, list[int]] = {}
    for row, adapter in enumerate(index_of_row):
        if adapter >= 0:
            rows_of.setdefault(adapter, []).append(row)
    size = _rows_per_group([len(rows) for rows in rows_of.values()])
    groups = [
        rows[start : start + size]
        for rows in rows_of.values()
        for start in range(0, len(rows), size)
    ]
    return sorted(group + group[-1:] * (size - len(group)) for group in groups)


def _rows_per_group(counts: list[int]) -> int:
    """The cheapest number of rows for adapters that are used so many times."""
    largest = max(counts, default=1)
    sizes = [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]

    def cost(size: int) -> float:
        groups = sum(-(-count // size) for count in counts)
        return groups * (_GROUP_COST + _ROW_COST * size)

    return min(sizes, key=cost)


def choose_kernels(
    kernels: Kernels, device: torch.device, dtype: torch.dtype
) -> Literal["plain", "triton"]:
    """The kernels that compute on this device in this precision; see `group_rows`.

    Raises:
        MissingExtraError: Triton was asked for by name, and is not installed.
        ConfigError: it was asked for by name where it cannot work.
    """
    if kernels != "triton":
        usable = kernels == "auto" and choice.fast() and _on_gpu(device) and dtype in _TRITON_DTYPES
        return "triton" if usable and _has_triton() else "plain"
    if not _has_triton():
        raise MissingExtraError("kernels='triton' (not 'auto')", "gpu")
    if dtype not in _TRITON_DTYPES:
        raise ConfigError(
            f"kernels='triton' has no {dtype}: use float32, bfloat16, float16 or 'auto'"
        )
    if not (_on_gpu(device) or _interpreted()):
        raise ConfigError(
            f"kernels='triton' needs a CUDA device of compute capability 8 or more, and the batch "
            f"is on {device}: use 'auto', or set TRITON_INTERPRET=1 before the start to debug"
        )
    return "triton"


def _on_gpu(device: torch.device) -> bool:
    # Before capability 8 a GPU has no bfloat16.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
