"""Singular value decompositions: exact ones, and the largest values of a large matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

EXACT_UP_TO = 1024
"""The smaller side of a matrix up to which its decomposition is exact: a second on one core."""
OVERSAMPLED = 10
"""Directions beyond those asked for, and rounds through the matrix, of the randomised one (Halko,
Martinsson and Tropp 2011, section 4): with these the largest values of a slowly falling spectrum
are right to about a percent."""
ROUNDS = 4


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
    in float32, for which torch's random state is left as it was.
    """
    smaller = min(matrix.shape)
    if smaller <= EXACT_UP_TO:
        return svd_of(matrix.double()).cut(rank), True
    width = min(2 * rank + OVERSAMPLED, smaller)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix.float(), q=width, niter=ROUNDS)
    return SVD(u.double(), s.double(), v.double()).cut(rank), False
