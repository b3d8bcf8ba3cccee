"""The report of two adapters beside each other: which directions they share, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.analysis.by_layer import ByLayer
from lorakit.analysis.checks import shape_of
from lorakit.analysis.comparing import Comparison
from lorakit.analysis.figures import HeatMap, plain, shown
from lorakit.analysis.page import Page, PageTable, Section
from lorakit.analysis.subspaces import Side, random_control

SIDES: Mapping[Side, str] = {"a": "A, what is read of the input", "b": "B, what is written"}
LARGEST_MAP = 64
"""Directions of a φ map: more would be cells that no screen shows."""


def comparison_page(
    first: Adapter, second: Adapter, found: Comparison, *, names: tuple[str, str]
) -> Page:
    """The report of two adapters of one base.

    Args:
        first: an adapter with low-rank updates.
        second: another, of any rank.
        found: their comparison.
        names: what they are called.
    """
    phi: dict[Side, dict[str, Tensor]] = {
        "a": {name: site.similarity_a for name, site in found.sites.items()},
        "b": {name: site.similarity_b for name, site in found.sites.items()},
    }
    sections = [_facts(first, second, names), _shared(phi), _maps(first, phi, names)]
    sections.append(_agreement(found, names))
    if notes := [*_notes(found, names)]:
        sections.append(Section(title="Not compared", text=notes))
    lead = f"Which directions {names[0]} and {names[1]} share, and whether they pull the same way."
    return Page(title=f"{names[0]} beside {names[1]}", lead=lead, sections=sections)


def _notes(found: Comparison, names: tuple[str, str]) -> Iterator[str]:
    for name, only in zip(names, (found.only_first, found.only_second), strict=True):
        if only:
            yield f"{len(only)} updates that only {name} has, the first at `{next(iter(only))}`."
    if found.without_magnitudes:
        yield "DoRA's magnitudes: ΔW is scale·B·A here."


def phi_map(name: str, title: str, note: str, phi: Tensor, *, names: tuple[str, str]) -> HeatMap:
    """φ(i, j) as in the paper's Figures 3 and 4: colours from 0 to 1.

    Args:
        name: of the figure's files.
        title: of the figure.
        note: what it shows.
        phi: its matrix over i and j.
        names: of the two adapters.
    """
    part = phi[:LARGEST_MAP, :LARGEST_MAP]
    return HeatMap(
        name=name,
        title=title,
        note=note,
        row_axis=f"i, of {names[0]}",
        column_axis=f"j, of {names[1]}",
        rows=[str(n + 1) for n in range(part.shape[0])],
        columns=[str(n + 1) for n in range(part.shape[1])],
        values=part.tolist(),
        unit="φ(i, j)",
        limits=(0.0, 1.0),
        colours="viridis",
    )


def mean_phi(phis: Sequence[Tensor]) -> Tensor:
    """The mean of φ over layers, as far as all of them have directions."""
    rows, columns = (min(phi.shape[axis] for phi in phis) for axis in (0, 1))
    return torch.stack([phi[:rows, :columns] for phi in phis]).mean(0)


def _facts(first: Adapter, second: Adapter, names: tuple[str, str]) -> Section:
    def told(adapter: Adapter) -> dict[str, str]:
        scores = adapter.card.get("scores") or {}
        return {
            "method": adapter.method,
            "base": adapter.base_name or "–",
            "rank": ", ".join(map(str, sorted({site.rank for site in adapter.sites}))),
            "scale": ", ".join(f"{s:.3g}" for s in sorted({site.scale for site in adapter.sites})),
            "trained parameters": f"{adapter.parameters:,}",
            "steps": str(adapter.card.get("step") or "–"),
            "scores": ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or "–",
            "content": adapter.content_hash()[:16],
        }

    one, other = told(first), told(second)
    table = PageTable(
        caption="Both adapters",
        head=["", *names],
        rows=[[entry, one[entry], other[entry]] for entry in one],
    )
    return Section(title="Adapters", tables=[table])


def _shared(phi: Mapping[Side, Mapping[str, Tensor]]) -> Section:
    """How much of the smaller adapter's space lies in the other's, by layer and module."""
    figures = []
    for side, told in SIDES.items():
        by_layer = ByLayer.of(phi[side])
        figures.append(
            HeatMap(
                name=f"shared-{side}",
                title=f"Shared space of {told}",
                note="φ of all directions of both: 1 where the smaller space lies in the other.",
                row_axis="layer",
                column_axis="module",
                rows=by_layer.layers,
                columns=by_layer.modules,
                values=by_layer.grid(phi[side], _last),
                unit="φ",
                limits=(0.0, 1.0),
                colours="viridis",
            )
        )
    return Section(title="Shared space", figures=figures)


def _last(phi: Tensor) -> float | None:
    return phi[-1, -1].item() if phi.numel() else None


def _maps(first: Adapter, phi: Mapping[Side, Mapping[str, Tensor]], names: Any) -> Section:
    """φ for each module: in a layer in the middle, on average, and of random matrices."""
    by_layer = ByLayer.of(phi["a"])
    shapes = {site.name: shape_of(first, site) for site in first.sites}
    figures = []
    for module in by_layer.modules:
        sites = by_layer.sites_of(module)
        middle = by_layer.middle if by_layer.middle in sites else next(iter(sites))
        where = f"{module} of layer {middle}" if middle else module
        for side in SIDES:
            own = phi[side][sites[middle]]
            if not own.numel():
                continue
            start = plain(f"phi-{side}-{module}")
            end = side.upper()
            note = f"φ(i, j) of the first i and j directions of {end}."
            figures.append(
                phi_map(plain(f"{start}-{middle}"), f"{end}, {where}", note, own, names=names)
            )
            if len(sites) > 1:
                mean = mean_phi([phi[side][site] for site in sites.values()])
                note = f"The mean of φ over {len(sites)} layers."
                figures.append(
                    phi_map(f"{start}-mean", f"{end}, {module}, mean", note, mean, names=names)
                )
        width = shapes[sites[middle]][1]
        rows, columns = phi["a"][sites[middle]].shape
        control = random_control((rows, width), (columns, width))
        note = "Two Gaussian matrices of the shapes of A: what nothing in common looks like."
        figures.append(
            phi_map(
                plain(f"phi-random-{module}"),
                f"Random, {where}",
                note,
                control,
                names=names,
            )
        )
    text = (
        "φ(i, j) is the share of the first min(i, j) directions that the two have in common "
        "(Hu et al. 2021, Eq. 4): 0 nothing, 1 all. The paper finds the first direction shared "
        "between ranks (Figure 3) and seeds (Figure 4), and later ones no more than by chance."
    )
    return Section(title="Directions in common", text=[text], figures=figures)


def _agreement(found: Comparison, names: tuple[str, str]) -> Section:
    """Whether the two ΔW of each site point the same way: the cosine between them."""
    by_layer = ByLayer.of(found.sites)
    cosines = [abs(site.cosine) for site in found.sites.values() if site.cosine is not None]
    most = max([*cosines, 0.01])
    figure = HeatMap(
        name="cosine",
        title="Agreement",
        note="The cosine between the two ΔW: 1 the same way, 0 unrelated, −1 opposite.",
        row_axis="layer",
        column_axis="module",
        rows=by_layer.layers,
        columns=by_layer.modules,
        values=by_layer.grid(found.sites, lambda site: site.cosine),
        unit="cosine of ΔW",
        # The colours have a midpoint, and so has what they show.
        limits=(-most, most),
        colours="PuOr",
    )
    rows = [
        [name, *map(shown, (*site.norms, site.cosine, site.relative_difference))]
        for name, site in found.sites.items()
    ]
    head = ["update", *(f"‖ΔW‖ of {name}" for name in names), "cosine", "relative difference"]
    table = PageTable(caption="Size and agreement by update", head=head, rows=rows)
    facts = {
        "cosine of all ΔW": shown(found.cosine),
        "relative difference": shown(found.relative_difference),
    }
    return Section(title="Size and agreement", facts=facts, figures=[figure], tables=[table])
