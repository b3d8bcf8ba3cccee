"""The layers that several adapters change, with the ΔW of each there.

One adapter may have a fused layer as a whole, another slices of it: such slices are then written as
updates of the whole layer, whose other rows are 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import RowRanges, Site
from lorakit.analysis.delta import LowRankDelta, low_rank_delta
from lorakit.analysis.rewrite import inner_shape
from lorakit.errors import AnalysisError


@dataclass(frozen=True, eq=False)
class CommonLayer:
    """A layer or a slice, and the ΔW that adapters have for it."""

    site: Site
    inner: tuple[int, ...]
    """The shape of A after its rank."""
    deltas: list[tuple[int, LowRankDelta]]
    """The number of the adapter, from 0, and its ΔW there."""


def shared_places(adapters: Sequence[Adapter]) -> tuple[CommonLayer, ...]:
    """Every layer or slice that some of the adapters change, by the first that does.

    Raises:
        AnalysisError: a layer has other shapes or slices in one adapter than in another.
    """
    whole = {
        site.path: adapter.tensors[f"{site.name}.lora_b"].shape[0]
        for adapter in adapters
        for site in adapter.sites
        if site.rows is None
    }
    places: dict[str, CommonLayer] = {}
    problems = []
    for number, adapter in enumerate(adapters):
        for site, inner, delta in _updates(adapter, whole):
            first = places.setdefault(site.name, CommonLayer(site, inner, []))
            if (first.inner, first.site.rows) != (inner, site.rows):
                problems.append(f"{site.name}  is another slice or kernel in adapter {number + 1}")
            elif first.deltas and first.deltas[0][1].shape != delta.shape:
                ours, theirs = first.deltas[0][1].shape, delta.shape
                problems.append(
                    f"{site.name}  {ours[0]}×{ours[1]} in adapter {first.deltas[0][0] + 1}, "
                    f"{theirs[0]}×{theirs[1]} in adapter {number + 1}"
                )
            else:
                first.deltas.append((number, delta))
    if problems:
        raise AnalysisError.listing("the adapters are of different bases: layers differ", problems)
    return tuple(places.values())


def _updates(
    adapter: Adapter, whole: Mapping[str, int]
) -> Iterator[tuple[Site, tuple[int, ...], LowRankDelta]]:
    """Each update of an adapter, a slice as one of its layer where that is among the whole ones.

    Args:
        adapter: what has the updates.
        whole: the rows of the layers that some adapter changes as a whole, by path.
    """
    for site in adapter.sites:
        delta, inner = low_rank_delta(adapter, site), inner_shape(adapter, site)
        if site.rows is not None and site.path in whole:
            delta = _on_whole_layer(delta, site.rows, whole[site.path])
            site = replace(site, role=None, rows=None, layer_rows=None)
        yield site, inner, delta


def _on_whole_layer(delta: LowRankDelta, ranges: RowRanges, rows: int) -> LowRankDelta:
    """ΔW of a slice as ΔW of a layer with some number of rows."""
    b = delta.b.new_zeros(rows, delta.rank)
    b[torch.cat([torch.arange(start, stop) for start, stop in ranges])] = delta.b
    return LowRankDelta(b, delta.a)
