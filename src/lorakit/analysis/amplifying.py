"""What ΔW amplifies: how much of W lies in the directions of ΔW (section 7.3, Table 7)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.delta import DenseDelta
from lorakit.analysis.svd import EXACT_UP_TO, top_norm


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """How much of one weight W lies in three sets of r directions.

    ‖UᵀWV‖_F, with U (d_out, r) and V (d_in, r) the left and right singular vectors of a matrix.
    """

    rank: int
    """The number of directions r; 0 where ΔW is 0."""
    weight_norm: float
    """‖W‖_F."""
    delta_norm: float
    """‖ΔW‖_F."""
    in_delta: float
    """‖UᵀWV‖_F in ΔW's own directions."""
    in_weight: float
    """In W's own top r directions: the most there can be."""
    in_random: float
    """In those of random matrices: what is to be expected, r·‖W‖/√(d_out·d_in), since one draw of a
    few directions may be half as much again. The paper's draws are 0.02 and 0.33, as this."""
    svd: Literal["exact", "randomised"]
    """How W's own directions were found."""

    @property
    def factor(self) -> float | None:
        """The amplification factor ‖ΔW‖_F/‖UᵀWV‖_F in ΔW's directions; None: W has nothing there.

        The paper finds 21.5 for W_q of GPT-3's 48th layer at r = 4.
        """
        return self.delta_norm / self.in_delta if self.in_delta else None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "factor": self.factor}


def amplification(
    adapter: AdapterSource,
    model: nn.Module,
    *,
    rank: int | None = None,
    seed: int = 0,
    allow_other_base: bool = False,
) -> dict[str, Amplification]:
    """How much of each weight lies in the directions that an adapter changes, by the site's name.

    Each weight of the base is read once, and of its own directions only the size is computed:
    exactly where its smaller side is up to 1,024, else by a randomised decomposition, which `svd`
    of each result says.

    Args:
        adapter: an adapter, its folder, or its hub id. That of DoRA or of full fine-tuning has no
            factors: its ΔW is decomposed as a matrix, which takes minutes at a width of 4,096.
        model: its base, loaded; an adapter that is attached to it does not matter.
        rank: how many directions, or as many as ΔW has where these are less. None: all of ΔW's,
            for a ΔW without factors 8.
        seed: of the randomised decompositions.
        allow_other_base: accept a base with other weights.

    Raises:
        AnalysisError: nothing in the adapter has a ΔW, a tensor is not finite, or the model's
            weights are not at hand.

    Examples:
        >>> found = lk.analysis.amplification("out/places", model, rank=4)
        >>> q = found["model.layers.0.self_attn.q_proj"]
        >>> q.in_random < q.in_weight < q.weight_norm
        True
    """
    adapter = Adapter.of(adapter)
    base = BaseWeights(adapter, model, allow_other_base=allow_other_base)
    return dict(_each(base, rank, seed))


DENSE_RANK = 8
"""How many directions of a ΔW without factors are looked at: the usual rank."""


def _each(base: BaseWeights, rank: int | None, seed: int) -> Iterator[tuple[str, Amplification]]:
    for change in base.changes():
        delta = change.delta.svd()
        most = DENSE_RANK if isinstance(change.delta, DenseDelta) else delta.rank
        used = delta.cut(min(rank or most, delta.rank))
        large = min(change.weight.shape) > EXACT_UP_TO
        weight = change.weight.float() if large else change.weight.double()
        own, exact = top_norm(weight, used.rank, seed=seed)
        norm = change.weight_norm
        yield (
            change.name,
            Amplification(
                rank=used.rank,
                weight_norm=norm,
                delta_norm=float(delta.s.norm()),
                in_delta=inside(weight, used.u, used.v),
                in_weight=own,
                in_random=used.rank * norm / math.sqrt(weight.numel()),
                svd="exact" if exact else "randomised",
            ),
        )


def inside(
    weight: Float[Tensor, "d_out d_in"], u: Float[Tensor, "d_out r"], v: Float[Tensor, "d_in r"]
) -> float:
    """‖UᵀWV‖_F."""
    return float((u.to(weight).mT @ (weight @ v.to(weight))).norm())
