"""Two adapters side by side: whether they change the same layers, in the same directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.adapter.site import Site
from lorakit.analysis.checks import check_low_rank, check_same_base, common_sites, uses_dora
from lorakit.analysis.delta import low_rank_delta
from lorakit.analysis.rewrite import distance
from lorakit.analysis.subspaces import angles_of, directions_of, similarity_of


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteComparison:
    """Two adapters at one site."""

    similarity_a: Tensor
    """φ(i, j) of the right singular vectors of the two A (Eq. 4)."""
    similarity_b: Tensor
    """φ(i, j) of the left singular vectors of the two B."""
    angles_a: Tensor
    """The principal angles of the two A, in radians, smallest first."""
    angles_b: Tensor
    """Those of the two B."""
    norms: tuple[float, float]
    """‖ΔW₁‖ and ‖ΔW₂‖; of DoRA without the magnitudes."""
    inner: float
    """tr(ΔW₁ᵀ·ΔW₂)."""
    distance: float
    """‖ΔW₁ − ΔW₂‖."""

    @property
    def cosine(self) -> float | None:
        """tr(ΔW₁ᵀΔW₂)/(‖ΔW₁‖‖ΔW₂‖): 1 for the same direction, 0 for unrelated; None: one is 0."""
        size = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.inner / size)) if size else None

    @property
    def relative_difference(self) -> float | None:
        """‖ΔW₁ − ΔW₂‖/‖ΔW₁‖; None: ΔW₁ is 0."""
        return self.distance / self.norms[0] if self.norms[0] else None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        tensors = {key: value.tolist() for key, value in vars(self).items() if key in TENSORS}
        numbers = {"cosine": self.cosine, "relative_difference": self.relative_difference}
        return {**tensors, "norms": list(self.norms), **numbers}


TENSORS = ("similarity_a", "similarity_b", "angles_a", "angles_b")


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Two adapters, site by site."""

    sites: Mapping[str, SiteComparison]
    """Those that both change, by name."""
    only_first: Mapping[str, float]
    """‖ΔW‖ of those that only the first changes."""
    only_second: Mapping[str, float]
    """‖ΔW‖ of those that only the second changes."""
    without_magnitudes: bool
    """Whether one is of DoRA, whose magnitudes are not compared: ΔW is scale·B·A here."""

    @property
    def cosine(self) -> float | None:
        """The cosine of the two ΔW, all sites together; a site that one leaves alone is 0 there."""
        first, second = self._norms
        size = first * second
        inner = math.fsum(site.inner for site in self.sites.values())
        return max(-1.0, min(1.0, inner / size)) if size else None

    @property
    def relative_difference(self) -> float | None:
        """‖ΔW₁ − ΔW₂‖/‖ΔW₁‖ of all sites together; None: ΔW₁ is 0."""
        alone = [*self.only_first.values(), *self.only_second.values()]
        total = math.hypot(*alone, *(site.distance for site in self.sites.values()))
        return total / self._norms[0] if self._norms[0] else None

    @property
    def _norms(self) -> tuple[float, float]:
        first, second = (
            math.hypot(*only.values(), *(site.norms[number] for site in self.sites.values()))
            for number, only in enumerate((self.only_first, self.only_second))
        )
        return first, second

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "cosine": self.cosine,
            "relative_difference": self.relative_difference,
            "sites": {name: site.to_json() for name, site in self.sites.items()},
            "only_first": dict(self.only_first),
            "only_second": dict(self.only_second),
            "without_magnitudes": self.without_magnitudes,
        }


def compare(
    first: AdapterSource, second: AdapterSource, *, allow_other_base: bool = False
) -> Comparison:
    """How alike two adapters are: φ, principal angles, cosine and difference of each ΔW.

    Args:
        first: an adapter with low-rank updates, its folder, or its hub id.
        second: another, of any rank.
        allow_other_base: accept adapters of different bases, if their layers have the same shapes.

    Raises:
        AnalysisError: they share no site, are of different bases, or one has no A and B.

    Examples:
        >>> found = lk.analysis.compare("out/places", "out/sql")
        >>> len(found.sites), round(found.cosine, 1)
        (60, 0.0)
    """
    one, other = Adapter.of(first), Adapter.of(second)
    check_low_rank([one, other], what="comparing", dora=True)
    check_same_base([one, other], allow_other_base=allow_other_base)
    pairs = common_sites(one, other)
    return Comparison(
        sites={site.name: _at(one, site, other, theirs) for site, theirs in pairs},
        only_first=_alone(one, {site.name for site in other.sites}),
        only_second=_alone(other, {site.name for site in one.sites}),
        without_magnitudes=uses_dora(one) or uses_dora(other),
    )


def _at(one: Adapter, site: Site, other: Adapter, theirs: Site) -> SiteComparison:
    deltas = low_rank_delta(one, site), low_rank_delta(other, theirs)
    a, b = (
        (directions_of(one, site, side), directions_of(other, theirs, side)) for side in ("a", "b")
    )
    return SiteComparison(
        similarity_a=similarity_of(*a),
        similarity_b=similarity_of(*b),
        angles_a=angles_of(*a),
        angles_b=angles_of(*b),
        norms=(deltas[0].norm(), deltas[1].norm()),
        inner=deltas[0].inner(deltas[1]),
        distance=distance(*deltas),
    )


def _alone(adapter: Adapter, others: set[str]) -> dict[str, float]:
    """‖ΔW‖ of the sites of an adapter that are not among some names."""
    return {
        site.name: low_rank_delta(adapter, site).norm()
        for site in adapter.sites
        if site.name not in others
    }
