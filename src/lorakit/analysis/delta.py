"""ΔW of one site as a matrix (d_out, d_in): by its factors B and A, or dense where it has none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.analysis.svd import SVD, svd_of, without_noise


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """ΔW = B·A in float64, with the scale in B; ΔW itself is formed by `dense` alone."""

    b: Float64[Tensor, "d_out rank"]
    a: Float64[Tensor, "rank d_in"]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of B."""
        return self.a.shape[0]

    def dense(self) -> Float64[Tensor, "d_out d_in"]:
        """ΔW."""
        return self.b @ self.a

    def svd(self) -> SVD:
        """The singular value decomposition: of R_B·R_Aᵀ (rank × rank), turned by the two Q."""
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        return SVD(q_b @ u, without_noise(s, self.shape, _size(r_b, r_a)), q_a @ vh.mT)

    def singular_values(self) -> Float64[Tensor, " k"]:
        """The singular values, largest first; the vectors are not formed."""
        r_b = torch.linalg.qr(self.b, mode="r").R
        r_a = torch.linalg.qr(self.a.mT, mode="r").R
        values = torch.linalg.svdvals(r_b @ r_a.mT)
        return without_noise(values, self.shape, _size(r_b, r_a))

    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(self.singular_values().norm())

    def inner(self, other: LowRankDelta) -> float:
        """The inner product tr(ΔW₁ᵀ·ΔW₂) with another site's ΔW."""
        return float(((self.b.mT @ other.b) * (self.a @ other.a.mT)).sum())

    def times(self, weight: float) -> LowRankDelta:
        """weight·ΔW."""
        return LowRankDelta(self.b * weight, self.a)


def _size(b: Tensor, a: Tensor) -> float:
    """A bound of the norm of B·A, whatever cancels out in it."""
    return float(b.norm() * a.norm())


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """ΔW as a matrix in float64: that of DoRA, or of weights that are trained in full."""

    matrix: Float64[Tensor, "d_out d_in"]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        """The most singular values that it can have."""
        return min(self.shape)

    def dense(self) -> Float64[Tensor, "d_out d_in"]:
        """ΔW."""
        return self.matrix

    def svd(self) -> SVD:
        """The full singular value decomposition."""
        return svd_of(self.matrix)

    def singular_values(self) -> Float64[Tensor, " k"]:
        """The singular values, largest first."""
        return without_noise(torch.linalg.svdvals(self.matrix), self.shape, self.norm())

    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(self.matrix.norm())


Delta = LowRankDelta | DenseDelta


def low_rank_delta(adapter: Adapter, site: Site) -> LowRankDelta:
    """ΔW = scale·B·A of a site, without DoRA's magnitudes.

    Of a convolution it is the matrix (c_out, c_in / groups · kernel), of an embedding
    (d_model, vocabulary).
    """
    a, b = (adapter.tensors[f"{site.name}.lora_{end}"].detach().flatten(1).double() for end in "ab")
    return LowRankDelta(b * site.scale, a)


def summed(deltas: Iterable[LowRankDelta]) -> LowRankDelta:
    """The sum of several ΔW of one site: their factors side by side, at the sum of the ranks."""
    each = list(deltas)
    return LowRankDelta(torch.cat([d.b for d in each], dim=1), torch.cat([d.a for d in each]))
