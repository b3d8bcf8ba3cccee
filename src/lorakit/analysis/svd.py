"""Singular value decompositions: exact ones, and the largest values of a large matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

EXACT_UP_TO = 1024
"""The smaller side of a matrix up to which its decomposition is exact: a second on one core."""
LEAST_BLOCK, BLOCKS = 16, 5
"""Columns of a block of the randomised decomposition, or as many as are asked for where these are
more, and how many blocks: the largest values are right to a thousandth where the spectrum falls as
1/i^0.3, and 3 % too small of a matrix of noise. Products of fewer columns take no less time."""


@dataclass(frozen=True, eq=False)
class SVD:
    """A singular value decomposition u·diag(s)·vᵀ in float64, the largest values first.

    Values that are rounding are exactly 0, and their vectors are arbitrary.
    """

    u: Float64[Tensor, "d_out k"]
    s: Float64[Tensor, " k"]
    v: Float64[Tensor, "d_in k"]

    @property
    def rank(self) -> int:
        """How many singular values are not 0."""
        return int((self.s > 0).sum())

    def cut(self, rank: int) -> SVD:
        """The largest singular values alone: the best approximation of a rank (Eckart-Young)."""
        return SVD(self.u[:, :rank], self.s[:rank], self.v[:, :rank])


def without_noise(
    values: Float64[Tensor, " k"], shape: tuple[int, int], size: float
) -> Float64[Tensor, " k"]:
    """Singular values with 0 for those that are rounding.

    Args:
        values: the largest first.
        shape: of the matrix.
        size: the largest number that it was computed from: its norm, or of a product the norms'
            product, so that what cancels out is 0.
    """
    least = size * torch.finfo(values.dtype).eps * max(shape)
    return torch.where(values > least, values, 0.0)


def svd_of(matrix: Float64[Tensor, "d_out d_in"]) -> SVD:
    """The full singular value decomposition of a matrix."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    size = float(s[0]) if len(s) else 0.0
    return SVD(u, without_noise(s, (matrix.shape[0], matrix.shape[1]), size), vh.mT)


def top_svd(matrix: Float[Tensor, "d_out d_in"], rank: int, *, seed: int = 0) -> tuple[SVD, bool]:
    """The largest singular values of a matrix with their vectors, and whether they are exact.

    Those of a matrix whose smaller side is above `EXACT_UP_TO` are from a randomised decomposition
    in float32, whose values are at most the true ones.
    """
    if min(matrix.shape) <= EXACT_UP_TO:
        return svd_of(matrix.double()).cut(rank), True
    if matrix.shape[0] < matrix.shape[1]:
        turned = _largest(matrix.mT.float(), rank, seed)
        return SVD(turned.v, turned.s, turned.u), False
    return _largest(matrix.float(), rank, seed), False


def top_norm(
    matrix: Float[Tensor, "d_out d_in"], rank: int, *, seed: int = 0
) -> tuple[float, bool]:
    """The norm of the largest singular values of a matrix, and whether it is exact.

    Without their vectors an exact one takes the eigenvalues of the smaller product with itself.
    """
    if min(matrix.shape) > EXACT_UP_TO:
        return float(top_svd(matrix, rank, seed=seed)[0].s.norm()), False
    exact = matrix.double()
    tall = exact if exact.shape[0] >= exact.shape[1] else exact.mT
    squares = torch.linalg.eigvalsh(tall.mT @ tall).clamp(min=0)
    return float(squares[len(squares) - rank :].sum().sqrt()), True


def _largest(tall: Float[Tensor, "rows columns"], rank: int, seed: int) -> SVD:
    """The largest singular values of a tall matrix, from a block Krylov space.

    The space is spanned by Ω, TᵀT·Ω, (TᵀT)²·Ω, … of a random Ω (Musco and Musco 2015), which is
    more exact than as many rounds of subspace iteration with twice the columns.
    """
    side = tall.shape[1]
    block = max(LEAST_BLOCK, rank)
    most = min(block * BLOCKS, side)
    draw = torch.randn(side, block, generator=torch.Generator().manual_seed(seed))
    basis = newest = torch.linalg.qr(draw.to(tall)).Q
    products = [tall @ newest]
    while (known := basis.shape[1]) < most:
        further = (tall.mT @ products[-1])[:, : most - known]
        # Householder's Q is orthonormal also where the space has no further direction.
        basis = torch.linalg.qr(torch.cat([basis, further], 1)).Q
        newest = basis[:, known:]
        products.append(tall @ newest)
    u, s, vh = torch.linalg.svd(torch.cat(products, 1), full_matrices=False)
    return SVD(u.double(), s.double(), (basis @ vh.mT).double()).cut(rank)
