"""Updates of experts as PEFT holds them: A and B of all experts in two matrices.

PEFT's `target_parameters` wraps a module once for each of its parameters that is adapted, one
wrapper around the other in the order of the parameters. So the name of a parameter's A and B says
how many wrappers are around it, and not which parameter it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

WRAPPED = "base_layer"
"""The name of what a wrapper of PEFT is around."""
ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""The parameters of experts that are known, in the order in which modules have them."""


def names_in_file(paths: Iterable[str]) -> dict[str, str]:
    """The path in PEFT's file of each adapted parameter.

    Args:
        paths: of the parameters in the base.
    """
    by_module: dict[str, list[str]] = {}
    for path in paths:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: ".".join([module, *[WRAPPED] * around])
        for module, own in by_module.items()
        for around, path in enumerate(sorted(own, key=_place, reverse=True))
    }


def unordered(paths: Iterable[str]) -> list[str]:
    """The parameters whose order within their module nothing tells."""
    alone = {name: path for path, name in names_in_file(paths).items()}
    modules = {path.rpartition(".")[0] for name, path in alone.items() if name.endswith(WRAPPED)}
    return [
        path
        for path in alone.values()
        if path.rpartition(".")[0] in modules and path.rpartition(".")[2] not in ORDER
    ]


def _place(path: str) -> tuple[int, str]:
    name = path.rpartition(".")[2]
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def joined(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's A (experts·rank, d_in) and B (d_out, rank·experts).

    Args:
        a: (experts, rank, d_in).
        b: (experts, d_out, rank).
    """
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def parted(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The A and B that `joined` makes PEFT's from."""
    by_expert = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return a.unflatten(0, (experts, -1)), by_expert.contiguous()


def on_whole_matrix(
    parts: Iterable[tuple[Tensor, Tensor, Tensor | None]], width: int, rows: int
) -> tuple[Tensor, Tensor]:
    """One A (experts, width, d_in) and B (experts, rows, width) of updates of slices.

    Args:
        parts: A, B, and the slice's rows (None: all), of each slice.
        width: the rank of the result, at least the sum of theirs.
        rows: those of the whole matrix.
    """
    parts = list(parts)
    first_a, first_b, _ = parts[0]
    a = first_a.new_zeros(first_a.shape[0], width, first_a.shape[2])
    b = first_b.new_zeros(first_b.shape[0], rows, width)
    start = 0
    for own_a, own_b, index in parts:
        columns = slice(start, start + own_a.shape[1])
        a[:, columns] = own_a
        b[:, slice(None) if index is None else index, columns] = own_b
        start += own_a.shape[1]
    return a, b


def row_numbers(ranges: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    """The rows in half-open ranges, int64."""
    return torch.cat([torch.arange(first, last, device=device) for first, last in ranges])


def parameter_of(name: str, wanted: Mapping[str, None] | Iterable[str]) -> str | None:
    """The path of the parameter that a path in PEFT's file stands for; None: nothing tells.

    Args:
        name: such as `model.layers.0.mlp.experts.base_layer`.
        wanted: PEFT's `target_parameters`.
    """
    parts = name.split(".")
    around = 0
    while parts and parts[-1] == WRAPPED:
        parts.pop()
        around += 1
    module = ".".join(parts)
    own = {
        f"{module}.{leaf}"
        for word in wanted
        for owner, _, leaf in [word.rpartition(".")]
        if not owner or module == owner or module.endswith(f".{owner}")
    }
    ordered = sorted(own, key=_place, reverse=True)
    return ordered[around] if around < len(ordered) else None
