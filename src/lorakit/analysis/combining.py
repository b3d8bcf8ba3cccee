"""Arithmetic with adapters: a weighted sum of their ΔW as one adapter, and what TIES and DARE make.

A sum is exact in r-space: the factors side by side, a QR of each, and an SVD of the small middle.
So its rank is the sum of the ranks at most, and the cross terms A₁B₂ that come of averaging A and B
by themselves do not arise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.analysis.checks import (
    biases_of_b,
    check_same_base,
    low_rank_problems,
    of_changed_bases,
)
from lorakit.analysis.common_layers import shared_places
from lorakit.analysis.delta import LowRankDelta, summed
from lorakit.analysis.dense_merges import dare, ties
from lorakit.analysis.rewrite import (
    NewAdapter,
    NewUpdate,
    beside_sites,
    dtype_of,
    relative_error,
)
from lorakit.analysis.svd import SVD, top_svd
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AnalysisError

Method = Literal["sum", "ties", "dare"]
WEIGHTS_SUM_TO_1 = 1e-9
"""How far from 1 the weights' sum may be by rounding."""
OF_USE = (
    "task",
    "task_type",
    "rows_kind",
    "labels",
    "end_tokens",
    "data",
    "may_answer_nothing",
    "chat_template",
)
"""Entries of a training card that say how an adapter is used; kept where all agree."""


def combine(
    adapters: Sequence[AdapterSource],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    method: Method = "sum",
    density: float = 0.5,
    seed: int = 0,
    allow_other_base: bool = False,
) -> Adapter:
    """One adapter whose ΔW is Σ wᵢ·ΔWᵢ, or what TIES or DARE make of these.

    A layer that some of the adapters leave alone has the sum of the others. Negation and scaling
    are weights of one adapter. Biases and modules saved in full replace the base's, so their
    weighted sum is defined where every adapter has them and the weights sum to 1.

    Args:
        adapters: those to combine, of one base, with low-rank updates of any ranks and scales.
        weights: one for each. None: equal ones that sum to 1.
        rank: the most that a site may have; what is cut off is told. None: the sum's own rank, at
            most the sum of the ranks and the layer's smaller side; for ties and dare the sum of
            the ranks.
        method: sum, exact in r-space; ties (Yadav et al. 2023): of each wᵢ·ΔWᵢ the largest entries,
            the sign of their sum, and the mean of those that have it; dare (Yu et al. 2024): the
            sum of what is left when entries are dropped at random. Ties and dare form each ΔW as a
            matrix of the layer's size, one site at a time, and write the nearest matrix of `rank`.
        density: the share of entries that ties keeps, or dare does not drop.
        seed: of what dare drops.
        allow_other_base: accept adapters of different bases, if their layers have the same shapes.

    Returns:
        The new adapter, in the widest precision of the given ones, float32 at least.
        `card["combined"]` has the method, weights and hashes of the adapters, and
        `relative_error`, ‖ΔW' − ΔW‖/‖ΔW‖ over all sites.

    Raises:
        AnalysisError: every reason why they cannot be combined.

    Examples:
        >>> both = lk.analysis.combine(["out/places", "out/sql"], [0.7, 0.3])
        >>> {site.rank for site in both.sites}
        {16}
        >>> both.card["combined"]["relative_error"] < 1e-6
        True
        >>> opposite = lk.analysis.combine(["out/places"], [-1.0])
    """
    given = [Adapter.of(each) for each in adapters]
    weights = _checked(given, weights, rank, density)
    check_same_base(given, allow_other_base=allow_other_base)
    merge = _Merge(method, density, torch.Generator().manual_seed(seed), rank)
    dtype = torch.promote_types(dtype_of(given), torch.float32)
    updates, missed = [], []
    for place in shared_places(given):
        svd, exact = merge.of([(weights[number], delta) for number, delta in place.deltas])
        updates.append(NewUpdate.of(place.site, svd, place.inner, dtype))
        missed.append(updates[-1].missed(exact))
    hashes = [adapter.content_hash() for adapter in given]
    told: dict[str, Any] = {"method": method, "weights": list(weights), "made_from": hashes}
    told |= {"relative_error": relative_error(missed), **merge.told}
    return replace(_like(given, weights).of(updates), card={**_card(given), "combined": told})


@dataclass(frozen=True)
class _Merge:
    """The way in which the ΔW of one site are combined."""

    method: Method
    density: float
    generator: torch.Generator
    rank: int | None
    told: dict[str, Any] = field(default_factory=dict)
    """What the card says of it beside method and weights."""

    def of(self, parts: Sequence[tuple[float, LowRankDelta]]) -> tuple[SVD, LowRankDelta | Tensor]:
        """The decomposition of the result at its rank, and the exact result."""
        if self.method == "sum":
            exact = summed(delta.times(weight) for weight, delta in parts)
            svd = exact.svd()
            return svd.cut(self.rank or svd.rank), exact
        if self.method == "ties":
            matrix = ties(parts, self.density)
        else:
            matrix = dare(parts, self.density, self.generator)
        most = self.rank or sum(delta.rank for _, delta in parts)
        svd, is_exact = top_svd(matrix, min(most, *matrix.shape))
        self.told["density"] = self.density
        self.told["svd"] = "exact" if is_exact else "randomised"
        return svd, matrix


def _checked(
    given: Sequence[Adapter],
    weights: Sequence[float] | None,
    rank: int | None,
    density: float,
) -> tuple[float, ...]:
    """The weights, once it is sure that the adapters can be combined with them.

    Raises:
        AnalysisError: every reason why they cannot.
    """
    if not given:
        raise AnalysisError("there is nothing to combine: give one adapter at least")
    found = tuple(weights) if weights is not None else (1 / len(given),) * len(given)
    problems = []
    if len(found) != len(given):
        problems.append(f"{len(given)} adapters have {len(found)} weights: give one for each")
    problems += [f"the weight {each!r} is no finite number" for each in found if not isfinite(each)]
    if rank is not None and rank < 1:
        problems.append(f"rank is 1 at least, found {rank!r}")
    if not 0 < density <= 1:
        problems.append(f"density is a share above 0 and up to 1, found {density!r}")
    for number, adapter in enumerate(given, start=1):
        if adapter.sites and adapter.method != "lora":
            extra = adapter.method.removeprefix("lora+")
            problems.append(f"adapter {number}  has {extra} beside LoRA, which has no weighted sum")
    if len({each.lora and each.lora.layer_replication for each in given}) > 1:
        problems.append("the adapters are for bases that run other blocks (layer_replication)")
    problems += low_rank_problems(given) + biases_of_b(given) + of_changed_bases(given)
    problems += [] if len(found) != len(given) else _beside_problems(given, found)
    if problems:
        raise AnalysisError.listing("the adapters cannot be combined", problems)
    return found


def _beside_problems(given: Sequence[Adapter], weights: Sequence[float]) -> Iterator[str]:
    """Why the biases and modules saved in full of some adapters have no weighted sum."""
    held = [beside_sites(adapter) for adapter in given]
    names = dict.fromkeys(name for each in held for name in each)
    if not names:
        return
    why = "it replaces the base's, so a weighted sum is defined where"
    for name in names:
        without = [str(n) for n, each in enumerate(held, start=1) if name not in each]
        if without:
            yield f"{name}  {why} all adapters have it, and adapter {', '.join(without)} does not"
        elif len({each[name].shape for each in held}) > 1:
            yield f"{name}  has another shape in each adapter"
    if abs(sum(weights) - 1) > WEIGHTS_SUM_TO_1:
        first = next(iter(names))
        yield f"{first}  {why} the weights sum to 1, and they sum to {sum(weights):g}"
    if len({str(each.lora and each.lora.trainable_token_indices) for each in given}) > 1:
        yield "the trained rows are of other tokens"
    if any(each.copied_modules for each in given) and len({_labels(each) for each in given}) > 1:
        yield "the heads are of other classes: " + "; ".join(map(_labels, given))


def _labels(adapter: Adapter) -> str:
    return ", ".join(map(str, adapter.card.get("labels") or ("unknown",)))


def _like(given: Sequence[Adapter], weights: Sequence[float]) -> NewAdapter:
    """The combination without its updates: settings, biases, and modules in full."""
    first, held = given[0], [beside_sites(adapter) for adapter in given]
    others = {
        name: sum(
            (w * each[name].double() for w, each in zip(weights, held, strict=True)),
            start=torch.zeros(()),
        ).to(tensor.dtype)
        for name, tensor in held[0].items()
    }
    base = next((each for each in given if each.base is not None), first)
    return NewAdapter(
        like=base,
        configs=(_settings(given),),
        others=others,
        copied_modules=first.copied_modules,
        target_modules=_if_same([each.target_modules for each in given], ()),
        unverified=tuple(dict.fromkeys(note for each in given for note in each.unverified)),
    )


def _settings(given: Sequence[Adapter]) -> LoRAConfig:
    """The first one's settings, with targets that name the layers of all."""
    configs = [adapter.lora for adapter in given]
    first = configs[0]
    assert first is not None
    chosen = {(each.targets, each.layers, each.exclude) for each in configs if each is not None}
    if len(chosen) == 1:
        return first
    names = tuple(place.site.name for place in shared_places(given))
    return first.model_copy(update={"targets": names, "layers": None, "exclude": ()})


def _card(given: Sequence[Adapter]) -> dict[str, Any]:
    """The entries on the use of an adapter that all training cards share."""
    cards = [adapter.card for adapter in given]
    found = {key: _if_same([card.get(key) for card in cards], None) for key in OF_USE}
    return {key: value for key, value in found.items() if value is not None}


def _if_same(values: Sequence[Any], otherwise: Any) -> Any:
    """The value that all have, or another one."""
    return values[0] if all(value == values[0] for value in values) else otherwise
