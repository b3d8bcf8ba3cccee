"""The report of an adapter, and of two beside each other: what there is to look at, as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import scores_of
from lorakit.analysis.amplifying import Amplification
from lorakit.analysis.by_layer import ByLayer
from lorakit.analysis.figures import Figure, HeatMap, Lines, plain, shown
from lorakit.analysis.page import Page, PageTable, Section
from lorakit.analysis.spectra import Spectrum
from lorakit.analysis.tracing import Trace
from lorakit.training.run_folder import LOG

SHARES = (0.9, 0.95, 0.99)
"""Of the energy: for each the smallest rank that keeps it is shown."""
CURVES = {"loss": "training", "eval_loss": "validation"}
"""The losses of a run's log, and what they are of."""
MOST_LOG_BYTES = 2**28
"""Of a run's log; one of a million steps has 10^8."""


@dataclass(frozen=True, kw_only=True)
class AdapterFindings:
    """What was found in an adapter; what is empty is not on the page."""

    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    """By the site's name."""
    amplified: Mapping[str, Amplification] = field(default_factory=dict)
    """Where the base was given."""
    traces: Sequence[Trace] = ()
    """Of the checkpoints of its run."""
    log: Sequence[Mapping[str, Any]] = ()
    """The lines of its run's log."""
    notes: Sequence[str] = ()
    """What could not be looked at, and why."""


def adapter_page(adapter: Adapter, found: AdapterFindings, *, name: str) -> Page:
    """The report of an adapter.

    Args:
        adapter: any, also one without ΔW, of which only the card and the training are shown.
        found: what was found in it.
        name: what it is called.
    """
    sections = [_facts(adapter)]
    if found.spectra:
        sections += [_where(found.spectra), _spectra(found.spectra)]
        sections += [_amplified(found.amplified)] if found.amplified else []
        sections.append(_advice(found.spectra))
    sections += [*_training(adapter, found), *_card(adapter)]
    notes = [*found.notes, *(f"not verified: {note}" for note in adapter.unverified)]
    if found.spectra and not found.amplified:
        notes.append("What needs the base's weights, such as ‖ΔW‖/‖W‖: `--model` names the base.")
    if notes:
        sections.append(Section(title="Not shown", text=notes))
    return Page(title=name, lead=f"What {name} changes in its base.", sections=sections)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The numbers of each step in a run's log; none where there is none, or another tool's."""
    file = folder / LOG
    try:
        if file.stat().st_size > MOST_LOG_BYTES:
            return []
        lines = file.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []
    numbers = (_numbers(entry) for entry in entries if isinstance(entry, dict))
    return [entry for entry in numbers if "step" in entry]


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if isinstance(value, int | float)}


def _facts(adapter: Adapter) -> Section:
    ranks = sorted({site.rank for site in adapter.sites})
    scales = sorted({site.scale for site in adapter.sites})
    facts = {
        "method": adapter.method,
        "base": adapter.base_name or "its files do not name it",
        "trained parameters": f"{adapter.parameters:,}",
        "size": f"{adapter.size_bytes / 1e6:.2f} MB",
        "content": f"`{adapter.content_hash()[:16]}`",
    }
    if adapter.sites:
        facts["updates"] = f"{len(adapter.sites)}"
        facts["rank"] = ", ".join(map(str, ranks))
        facts["scale"] = ", ".join(f"{scale:.3g}" for scale in scales)
    if adapter.copied_modules:
        facts["saved in full"] = ", ".join(adapter.copied_modules)
    return Section(title="Adapter", facts=facts)


def _where(spectra: Mapping[str, Spectrum]) -> Section:
    """Which layers and modules were changed most, and by how many directions."""
    by_layer = ByLayer.of(spectra)

    def heat_map(name: str, title: str, note: str, unit: str, number: Any) -> HeatMap:
        return HeatMap(
            name=name,
            title=title,
            note=note,
            row_axis="layer",
            column_axis="module",
            rows=by_layer.layers,
            columns=by_layer.modules,
            values=by_layer.grid(spectra, number),
            unit=unit,
        )

    figures = [
        heat_map(
            "norm",
            "Size of the change",
            "‖ΔW‖, the Frobenius norm of each update.",
            "‖ΔW‖",
            lambda each: each.norm,
        )
    ]
    if any(each.relative_norm is not None for each in spectra.values()):
        figures.append(
            heat_map(
                "relative-norm",
                "Size beside the base",
                "‖ΔW‖ divided by ‖W‖, the norm of the weight it is added to.",
                "‖ΔW‖/‖W‖",
                lambda each: each.relative_norm,
            )
        )
    figures.append(
        heat_map(
            "effective-rank",
            "Effective rank",
            "How many directions an update uses: the exponential of its spectrum's entropy, at "
            "most r.",
            "effective rank",
            lambda each: each.effective_rank,
        )
    )
    return Section(title="Where it changed", figures=figures)


def _spectra(spectra: Mapping[str, Spectrum]) -> Section:
    by_layer = ByLayer.of(spectra)
    figures = []
    for module in by_layer.modules:
        sites = by_layer.sites_of(module)
        values = {layer or module: spectra[site].singular_values for layer, site in sites.items()}
        most = max(map(len, values.values()))
        figures.append(
            Lines(
                name=f"spectrum-{plain(module)}",
                title=f"Spectrum of {module}",
                note="The singular values of ΔW, largest first, a line for each layer.",
                x_axis="number of the singular value",
                y_axis="singular value σ",
                x=range(1, most + 1),
                lines={layer: [*own, *[None] * (most - len(own))] for layer, own in values.items()},
                logarithmic=True,
                ordered="layer",
            )
        )
    return Section(
        title="Spectra",
        text=[
            "A line that falls steeply says that fewer ranks would do; a flat one, that more could."
        ],
        figures=figures,
    )


def _amplified(amplified: Mapping[str, Amplification]) -> Section:
    """Table 7's numbers, of each module in the middle layer and of all updates."""
    by_layer = ByLayer.of(amplified)
    rows = [
        [
            _site(by_layer, name),
            str(each.rank),
            *map(shown, (each.in_delta, each.in_weight, each.in_random)),
            *map(shown, (each.weight_norm, each.delta_norm, each.factor)),
        ]
        for name, each in amplified.items()
    ]
    head = ["update", "r", "in ΔW's directions", "in W's", "in random ones"]
    head += ["‖W‖", "‖ΔW‖", "amplification"]
    ways = {each.svd for each in amplified.values()}
    text = (
        "‖UᵀWV‖, how much of the base's weight W lies in the r directions of ΔW, in W's own first "
        "ones and in random ones (Hu et al. 2021, Table 7), and the amplification factor "
        "‖ΔW‖/‖UᵀWV‖: how much more of its directions ΔW holds than W does. "
        f"W's own directions: {' and '.join(sorted(ways))} decomposition."
    )
    figure = HeatMap(
        name="amplification",
        title="Amplification factor",
        note="‖ΔW‖/‖UᵀWV‖ in ΔW's directions.",
        row_axis="layer",
        column_axis="module",
        rows=by_layer.layers,
        columns=by_layer.modules,
        values=by_layer.grid(amplified, lambda each: each.factor),
        unit="factor",
    )
    table = PageTable(caption="‖UᵀWV‖ by update", head=head, rows=rows)
    return Section(title="Amplification", text=[text], figures=[figure], tables=[table])


def _advice(spectra: Mapping[str, Spectrum]) -> Section:
    """The ranks that keep a share of each update's energy."""
    by_layer = ByLayer.of(spectra)
    rows = [
        [
            _site(by_layer, name),
            str(each.rank),
            f"{each.effective_rank:.1f}",
            *(str(each.rank_for(share)) for share in SHARES),
        ]
        for name, each in spectra.items()
    ]
    now = _parameters(spectra, lambda each: each.rank)
    told = []
    for share in SHARES:
        count = _parameters(spectra, lambda each, share=share: each.rank_for(share))
        told.append(f"{share:.0%} needs {count:,} parameters ({count / max(now, 1):.0%})")
    text = (
        "The smallest rank of each update that keeps a share of its energy, the sum of its squared "
        f"singular values. Of now {now:,} parameters, {'; '.join(told)}. What a model answers "
        "may hold on less, or need more: score the smaller adapter before you use it."
    )
    head = ["update", "rank now", "effective rank", *(f"rank for {share:.0%}" for share in SHARES)]
    table = PageTable(caption="Ranks by update", head=head, rows=rows)
    return Section(title="Rank advice", text=[text], tables=[table])


def _site(by_layer: ByLayer, name: str) -> str:
    place = by_layer.places[name]
    return f"layer {place.layer}, {place.module}" if place.layer else place.module


def _parameters(spectra: Mapping[str, Spectrum], rank: Any) -> int:
    """The values of A and B at some ranks."""
    return sum(rank(each) * sum(each.shape) for each in spectra.values())


def _training(adapter: Adapter, found: AdapterFindings) -> Iterator[Section]:
    """The curve of the run, how ΔW grew in it, and the scores that the card has."""
    facts = scores_of(adapter.card)
    if step := adapter.card.get("step"):
        facts = {"steps": str(step), **facts}
    figures = [*_curve(adapter, found.log), *_growth(found.traces)]
    if figures or facts:
        yield Section(title="Training", facts=facts, figures=figures)


def _curve(adapter: Adapter, log: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    points = {
        told: {entry["step"]: entry[key] for entry in log if key in entry}
        for key, told in CURVES.items()
    }
    points = {told: own for told, own in points.items() if own}
    steps = sorted({step for own in points.values() for step in own})
    if len(steps) > 1:
        unit = "nats per token" if adapter.card.get("task") == "generation" else "nats"
        yield Lines(
            name="training",
            title="Training curve",
            note="The loss by step, as the run's log has it.",
            x_axis="step",
            y_axis=f"loss ({unit})",
            x=steps,
            lines={told: [own.get(step) for step in steps] for told, own in points.items()},
        )


def _growth(traces: Sequence[Trace]) -> Iterator[Figure]:
    """How large ΔW was at each checkpoint, of how many directions, and how near to the end's."""
    if len(traces) < 2:
        return
    asked: tuple[tuple[str, str, str, str, Any], ...] = (
        (
            "growth",
            "Growth",
            "The norm of ΔW at each checkpoint, the median over layers.",
            "‖ΔW‖",
            lambda trace, site: trace.spectra[site].norm,
        ),
        (
            "growth-rank",
            "Growth of the effective rank",
            "The effective rank at each checkpoint, the median over layers.",
            "effective rank",
            lambda trace, site: trace.spectra[site].effective_rank,
        ),
        (
            "turning",
            "Turning",
            "φ(1, 1) of A then and at the end, the median over layers: 1 is the same direction.",
            "φ(1, 1)",
            lambda trace, site: trace.similarity[site][0, 0].item(),
        ),
    )
    by_layer = ByLayer.of(traces[-1].spectra)
    for name, title, note, unit, number in asked:
        yield Lines(
            name=name,
            title=title,
            note=note,
            x_axis="step",
            y_axis=unit,
            x=[trace.step for trace in traces],
            lines={
                module: [
                    median(number(trace, site) for site in by_layer.sites_of(module).values())
                    for trace in traces
                ]
                for module in by_layer.modules
            },
        )


def _card(adapter: Adapter) -> Iterator[Section]:
    rows = [[name, value] for name, value in _flat(adapter.card) if value]
    if rows:
        table = PageTable(caption="What the training recorded", head=["entry", "value"], rows=rows)
        yield Section(title="Card", tables=[table])


def _flat(entries: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """The entries of a card by dotted name; long texts are cut."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{within}{name}", _cut(", ".join(map(str, value)))
        else:
            yield f"{within}{name}", _cut("" if value is None else str(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"
