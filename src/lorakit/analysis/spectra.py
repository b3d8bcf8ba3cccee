"""The spectrum of ΔW: its singular values, and how much rank they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.checks import check_low_rank
from lorakit.analysis.delta import Delta, low_rank_delta


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of one ΔW, and what follows from them."""

    shape: tuple[int, int]
    """(d_out, d_in) of ΔW."""
    rank: int
    """The rank that the adapter has there, r."""
    singular_values: tuple[float, ...]
    """σ₁ ≥ σ₂ ≥ …, at most `rank`; those that are rounding are 0."""
    base_norm: float | None = None
    """‖W‖_F of the weight that ΔW is added to; None: the base was not given."""

    @property
    def norm(self) -> float:
        """‖ΔW‖_F, the root of the sum of σᵢ²."""
        return math.hypot(*self.singular_values)

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖_F/‖W‖_F; None: the base was not given, or W is 0."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def energy(self) -> tuple[float, ...]:
        """The share σᵢ²/Σσ² of each direction; all 0 where ΔW is 0."""
        total = self.norm**2
        return tuple(value**2 / total if total else 0.0 for value in self.singular_values)

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of σᵢ/Σσ (Roy and Vetterli 2007); 0 where ΔW is 0.

        It is k where k singular values are equal and the others 0.
        """
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values if value > 0]
        return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F²/σ₁²; 0 where ΔW is 0."""
        largest = self.singular_values[0] if self.singular_values else 0.0
        return (self.norm / largest) ** 2 if largest else 0.0

    @property
    def numerical_rank(self) -> int:
        """How many singular values are not 0."""
        return sum(value > 0 for value in self.singular_values)

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps a share of Σσ²: 1 keeps all but rounding; 0 if ΔW is 0."""
        return rank_for(self.singular_values, energy)

    def lost_at(self, rank: int) -> float:
        """The share of Σσ² that the best approximation of a rank loses."""
        total = self.norm**2
        return math.fsum(v**2 for v in self.singular_values[rank:]) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "shape": list(self.shape),
            "rank": self.rank,
            "singular_values": list(self.singular_values),
            "energy": list(self.energy),
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "norm": self.norm,
            "base_norm": self.base_norm,
            "relative_norm": self.relative_norm,
        }

    @staticmethod
    def of(delta: Delta, *, rank: int, base_norm: float | None = None) -> Spectrum:
        """The spectrum of a ΔW."""
        values = tuple(delta.singular_values().tolist())
        return Spectrum(shape=delta.shape, rank=rank, singular_values=values, base_norm=base_norm)


def rank_for(singular_values: Sequence[float], energy: float) -> int:
    """The smallest rank that keeps a share of the sum of squares of falling singular values."""
    lost = (1 - energy) * math.fsum(value**2 for value in singular_values)
    rank, tail = sum(value > 0 for value in singular_values), 0.0
    while rank and tail + singular_values[rank - 1] ** 2 <= lost:
        rank -= 1
        tail += singular_values[rank] ** 2
    return rank


def spectrum(
    adapter: AdapterSource,
    *,
    model: nn.Module | None = None,
    allow_other_base: bool = False,
) -> dict[str, Spectrum]:
    """The singular values of each ΔW of an adapter, by the site's name.

    They are computed in float64 from A and B: a QR of each and the singular values of a product
    (rank × rank). ΔW itself is formed for DoRA and for weights saved in full alone.

    Args:
        adapter: an adapter with low-rank updates, its folder, or its hub id. With `model` also one
            of DoRA, or of full fine-tuning.
        model: its base, for ‖W‖ beside ‖ΔW‖; an adapter that is attached to it does not matter.
        allow_other_base: accept a base with other weights.

    Raises:
        AnalysisError: nothing in the adapter has a ΔW, it needs the base, a tensor is not finite,
            or the model's weights are not at hand.

    Examples:
        >>> spectra = lk.analysis.spectrum("out/places")
        >>> found = spectra["model.layers.0.self_attn.q_proj"]
        >>> found.shape, found.rank, len(found.singular_values)
        ((576, 576), 8, 8)
        >>> found.rank_for(energy=0.9) <= found.rank
        True
    """
    adapter = Adapter.of(adapter)
    if model is not None:
        base = BaseWeights(adapter, model, allow_other_base=allow_other_base)
        return {
            each.name: Spectrum.of(each.delta, rank=each.rank, base_norm=each.weight_norm)
            for each in base.changes()
        }
    check_low_rank([adapter], what="the spectrum")
    return {
        site.name: Spectrum.of(low_rank_delta(adapter, site), rank=site.rank)
        for site in adapter.sites
    }
