"""Intruder dimensions: singular vectors of W + ΔW that are unlike any of W's.

Shuttleworth et al. 2024 (LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228,
section 3) find them in weights that LoRA has trained, and few where all weights were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float64
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.checkpoint_weights import CheckpointWeights
from lorakit.analysis.svd import EXACT_UP_TO, top_svd
from lorakit.errors import AnalysisError

COMPARED_WITH = 256
"""How many of W's singular vectors stand for all in a weight too large for an exact decomposition:
at most so many intruders too many are then counted as there are beyond them."""


@dataclass(frozen=True, kw_only=True)
class Intruders:
    """The leading left singular vectors of one W + ΔW, beside those of W."""

    cosines: tuple[float, ...]
    """For each of the leading vectors, the largest |cosine| with any of W's."""
    threshold: float
    """A vector whose largest cosine is below this is an intruder."""
    compared_with: int
    """How many of W's singular vectors each was compared with."""
    svd: Literal["exact", "randomised"]
    """How they were found. Of randomised ones only W's leading vectors are known, so that the count
    is an upper bound."""

    @property
    def count(self) -> int:
        """How many of the leading vectors are intruders."""
        return sum(cosine < self.threshold for cosine in self.cosines)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**vars(self), "cosines": list(self.cosines), "count": self.count}


def intruders(
    tuned: AdapterSource | nn.Module,
    model: nn.Module,
    *,
    top: int = 10,
    threshold: float = 0.5,
    targets: Sequence[str] | str = ("all-linear",),
    seed: int = 0,
    allow_other_base: bool = False,
) -> dict[str, Intruders]:
    """The intruder dimensions of each changed weight, by the site's name.

    W and W + ΔW are decomposed as matrices: exactly where their smaller side is up to 1,024, else
    by a randomised decomposition of their leading vectors.

    Args:
        tuned: an adapter, its folder, or its hub id; or a model that was fine-tuned in full.
        model: the base, loaded; an adapter that is attached to it does not matter.
        top: how many leading singular vectors of W + ΔW are looked at.
        threshold: the largest |cosine| with any of W's singular vectors below which one is an
            intruder.
        targets: of a model fine-tuned in full, the layers to compare, in LoRAConfig's words.
        seed: of the randomised decompositions.
        allow_other_base: accept a base with other weights than the adapter was trained on.

    Raises:
        AnalysisError: nothing in the adapter has a ΔW, a tensor is not finite, or the weights are
            not at hand or of other shapes.
        TargetError: a target names nothing in the model.

    Examples:
        >>> found = lk.analysis.intruders("out/places", model)
        >>> found["model.layers.0.self_attn.q_proj"].count
        0
    """
    if top < 1 or not 0 < threshold <= 1:
        raise AnalysisError(
            f"top is 1 at least and threshold a cosine above 0, found {top!r} and {threshold!r}"
        )
    if isinstance(tuned, nn.Module):
        weights: BaseWeights | CheckpointWeights = CheckpointWeights(model, tuned, targets)
    else:
        weights = BaseWeights(Adapter.of(tuned), model, allow_other_base=allow_other_base)
    return {
        change.name: _found(
            change.weight.double(), change.delta.dense(), top=top, threshold=threshold, seed=seed
        )
        for change in weights.changes()
    }


def _found(
    weight: Float64[Tensor, "d_out d_in"],
    delta: Float64[Tensor, "d_out d_in"],
    *,
    top: int,
    threshold: float,
    seed: int,
) -> Intruders:
    smaller = min(weight.shape)
    known = smaller if smaller <= EXACT_UP_TO else COMPARED_WITH
    before, exact = top_svd(weight, known, seed=seed)
    after, _ = top_svd(weight + delta, min(top, smaller), seed=seed)
    cosines = (before.u.mT @ after.u).abs().amax(0).clamp(max=1)
    return Intruders(
        cosines=tuple(cosines.tolist()),
        threshold=threshold,
        compared_with=known,
        svd="exact" if exact else "randomised",
    )
