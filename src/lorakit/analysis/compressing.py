"""A smaller adapter: at each site the smallest rank that keeps a share of ΔW's energy."""

from __future__ import annotations

from dataclasses import replace

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.analysis.checks import biases_of_b, check_low_rank, of_changed_bases
from lorakit.analysis.delta import low_rank_delta
from lorakit.analysis.rewrite import (
    NewAdapter,
    NewUpdate,
    beside_sites,
    dtype_of,
    inner_shape,
    relative_error,
)
from lorakit.analysis.spectra import rank_for
from lorakit.analysis.svd import SVD
from lorakit.errors import AnalysisError

OF_THE_FORMER = ("scores",)
"""Entries of a training card that are not true of the adapter once it is compressed."""


def compress(
    adapter: AdapterSource, *, energy: float | None = None, rank: int | None = None
) -> Adapter:
    """An adapter with the best approximation of each ΔW at a smaller rank (Eckart and Young).

    Give one of the two. Biases and modules saved in full stay. The sites' ranks may differ; PEFT
    and servers read them from `rank_pattern`. A site where ΔW is 0 keeps rank 1.

    Args:
        adapter: an adapter with low-rank updates, its folder, or its hub id.
        energy: the share of each ΔW's Σσ² to keep, above 0 and up to 1: at each site the smallest
            rank that does. 1 keeps all but rounding: rank that A and B have and do not use goes.
        rank: the same rank for all, or the site's own where that is less.

    Returns:
        The new adapter. `card["compressed"]` has what was asked, the hash of the adapter that it
        was made from with its scores, and the error: ‖ΔW' − ΔW‖/‖ΔW‖ over all sites.

    Raises:
        AnalysisError: neither or both are given, or the adapter has no ΔW = scale·B·A.

    Examples:
        >>> smaller = lk.analysis.compress("out/places", energy=0.9)
        >>> smaller.parameters < lk.Adapter.load("out/places").parameters
        True
        >>> smaller.card["compressed"]["relative_error"] < 0.1**0.5
        True
    """
    check_size(energy, rank)
    adapter = Adapter.of(adapter)
    check_low_rank([adapter], what="compressing")
    if problems := [*biases_of_b([adapter]), *of_changed_bases([adapter])]:
        raise AnalysisError.listing("compressing would change what it answers", problems)
    updates, missed = [], []
    for site in adapter.sites:
        exact = low_rank_delta(adapter, site)
        svd = cut(exact.svd(), energy, rank)
        updates.append(NewUpdate.of(site, svd, inner_shape(adapter, site), dtype_of([adapter])))
        missed.append(updates[-1].missed(exact))
    made = NewAdapter(
        like=adapter,
        configs=adapter.configs,
        others=beside_sites(adapter),
        copied_modules=adapter.copied_modules,
        target_modules=adapter.target_modules,
        unverified=adapter.unverified,
    ).of(updates)
    told = {
        **({"energy": energy} if rank is None else {"rank": rank}),
        "relative_error": relative_error(missed),
        "made_from": adapter.content_hash(),
        "scores_before": adapter.card.get("scores") or {},
    }
    kept = {key: value for key, value in adapter.card.items() if key not in OF_THE_FORMER}
    return replace(made, card={**kept, "compressed": told})


def check_size(energy: float | None, rank: int | None) -> None:
    """Make sure that one of energy and rank is given, in its range.

    Raises:
        AnalysisError: they are not.
    """
    if (energy is None) == (rank is None):
        raise AnalysisError("give energy, the share to keep, or rank: one of the two")
    if energy is not None and not 0 < energy <= 1:
        raise AnalysisError(f"energy is a share above 0 and up to 1, found {energy!r}")
    if rank is not None and rank < 1:
        raise AnalysisError(f"rank is 1 at least, found {rank!r}")


def cut(svd: SVD, energy: float | None, rank: int | None) -> SVD:
    """A decomposition cut to the smallest rank that keeps a share of the energy, or to a rank."""
    return svd.cut(rank_for(svd.s.tolist(), energy) if energy is not None else rank or svd.rank)
