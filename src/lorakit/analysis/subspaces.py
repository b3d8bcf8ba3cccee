"""Whether two adapters use the same directions: φ of the paper's Eq. 4, and principal angles.

Of A (rank, d_in) the directions are its right singular vectors, of B (d_out, rank) its left ones,
as in the paper: not those of their product. An adapter's A or B may have fewer directions than its
rank (an untrained B has none); φ has a row or a column for each that there is.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.adapter.site import Site
from lorakit.analysis.checks import check_low_rank, check_same_base, common_sites
from lorakit.analysis.svd import svd_of

Side = Literal["a", "b"]


def subspace_similarity(
    first: AdapterSource,
    second: AdapterSource,
    *,
    side: Side = "a",
    allow_other_base: bool = False,
) -> dict[str, Tensor]:
    """φ(i, j) = ‖U₁[:, :i]ᵀ·U₂[:, :j]‖²_F / min(i, j) of the sites that two adapters share (Eq. 4).

    Args:
        first: an adapter, its folder, or its hub id.
        second: another, of any rank.
        side: whose directions: "a", the right singular vectors of A; "b", the left ones of B.
        allow_other_base: accept adapters of different bases, if their layers have the same shapes.

    Returns:
        By the site's name a float64 matrix of values from 0 to 1; its entry [i - 1, j - 1] is
        φ(i, j), and its shape the numbers of directions.

    Raises:
        AnalysisError: they share no site, are of different bases, or one has no A and B.

    Examples:
        >>> phi = lk.analysis.subspace_similarity("out/places", "out/places")
        >>> phi["model.layers.0.self_attn.q_proj"].diagonal().min().item() > 0.999
        True
    """
    return {
        name: similarity_of(one, other)
        for name, one, other in _pairs(first, second, side, allow_other_base)
    }


def principal_angles(
    first: AdapterSource,
    second: AdapterSource,
    *,
    side: Side = "a",
    allow_other_base: bool = False,
) -> dict[str, Tensor]:
    """The principal angles between the subspaces of two adapters, in radians, smallest first.

    Args:
        first: an adapter, its folder, or its hub id.
        second: another, of any rank.
        side: whose directions: "a" or "b", as in `subspace_similarity`.
        allow_other_base: accept adapters of different bases, if their layers have the same shapes.

    Returns:
        By the site's name a float64 vector, as long as the smaller number of directions.

    Raises:
        AnalysisError: they share no site, are of different bases, or one has no A and B.

    Examples:
        >>> angles = lk.analysis.principal_angles("out/places", "out/places")
        >>> angles["model.layers.0.self_attn.q_proj"].max().item() < 1e-6
        True
    """
    return {
        name: angles_of(one, other)
        for name, one, other in _pairs(first, second, side, allow_other_base)
    }


def random_control(first: tuple[int, int], second: tuple[int, int], *, seed: int = 0) -> Tensor:
    """φ of two random Gaussian matrices: what two adapters without anything in common have.

    Figure 4 has it beside the two seeds.

    Args:
        first: the shape (rank, d_in) of one adapter's A; for its B (rank, d_out).
        second: that of the other's, with the same d_in.
        seed: of the two matrices.

    Returns:
        A float64 matrix (rank of the first, rank of the second).

    Examples:
        >>> lk.analysis.random_control((8, 576), (8, 576))[-1, -1].item() < 0.05
        True
    """
    generator = torch.Generator().manual_seed(seed)
    one, other = (
        directions(torch.randn(shape, generator=generator, dtype=torch.float64).mT)
        for shape in (first, second)
    )
    return similarity_of(one, other)


def similarity_of(
    one: Float64[Tensor, "d i"], other: Float64[Tensor, "d j"]
) -> Float64[Tensor, "i j"]:
    """φ(i, j) of two sets of orthonormal columns, for every number of leading ones."""
    overlap = (one.mT @ other).square().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, size + 1, dtype=torch.float64) for size in overlap.shape)
    # An overlap of all can come out as 1 + 2e-16.
    return (overlap / torch.minimum(rows[:, None], columns)).clamp(max=1)


def angles_of(one: Float64[Tensor, "d i"], other: Float64[Tensor, "d j"]) -> Float64[Tensor, " k"]:
    """The principal angles of two sets of orthonormal columns, smallest first."""
    if one.shape[1] < other.shape[1]:
        one, other = other, one
    product = one.mT @ other
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    # The cosine of a small angle has lost it to rounding; its sine has not (Björck and Golub 1973).
    sines = torch.linalg.svdvals(other - one @ product).flip(0).clamp(max=1)
    return torch.where(cosines.square() > 0.5, sines.arcsin(), cosines.arccos())


def directions(tall: Float64[Tensor, "d rank"]) -> Float64[Tensor, "d k"]:
    """The left singular vectors of a matrix, largest value first, without those of value 0."""
    q, r = torch.linalg.qr(tall)
    inner = svd_of(r)
    return q @ inner.u[:, : inner.rank]


def directions_of(adapter: Adapter, site: Site, side: Side) -> Float64[Tensor, "d k"]:
    """The directions of A or B at a site."""
    factor = adapter.tensors[f"{site.name}.lora_{side}"].detach().flatten(1).double()
    return directions(factor.mT if side == "a" else factor)


def _pairs(
    first: AdapterSource, second: AdapterSource, side: Side, allow_other_base: bool
) -> list[tuple[str, Tensor, Tensor]]:
    """The name of each common site, and both adapters' directions there."""
    adapters = Adapter.of(first), Adapter.of(second)
    check_low_rank(adapters, what="comparing subspaces", dora=True)
    check_same_base(adapters, allow_other_base=allow_other_base)
    return [
        (one.name, directions_of(adapters[0], one, side), directions_of(adapters[1], other, side))
        for one, other in common_sites(*adapters)
    ]
