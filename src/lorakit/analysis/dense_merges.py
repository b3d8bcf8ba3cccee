"""TIES and DARE: ways to combine several ΔW entry by entry, which need them as matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from lorakit.analysis.delta import LowRankDelta

Parts = Sequence[tuple[float, LowRankDelta]]
"""The weight and ΔW of each adapter at one site."""


def ties(parts: Parts, density: float) -> Float64[Tensor, "d_out d_in"]:
    """TIES (Yadav et al. 2023, section 3): trim, elect a sign, and take the mean of what has it.

    Of each w·ΔW the largest entries are kept, a share `density` of them. The sign of an entry is
    that of the sum of what is kept; the result is the mean of those that have it.
    """
    kept = torch.stack([_largest(delta.dense() * weight, density) for weight, delta in parts])
    agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare(parts: Parts, density: float, generator: torch.Generator) -> Float64[Tensor, "d_out d_in"]:
    """DARE (Yu et al. 2024, section 3): drop entries of each ΔW at random, and rescale the others.

    An entry stays with probability `density` and is then divided by it, so that the expected sum
    is Σ w·ΔW.
    """
    total = torch.zeros(parts[0][1].shape, dtype=torch.float64)
    for weight, delta in parts:
        stays = torch.rand(delta.shape, generator=generator) < density
        total += delta.dense() * stays * (weight / density)
    return total


def _largest(matrix: Float64[Tensor, "d_out d_in"], share: float) -> Float64[Tensor, "d_out d_in"]:
    """A matrix with 0 for all but a share of its entries, those of the largest magnitude."""
    size = matrix.abs()
    count = max(1, round(share * size.numel()))
    least = size.flatten().kthvalue(size.numel() - count + 1).values
    return torch.where(size >= least, matrix, 0.0)
