"""The verb inspect: what an adapter is, what its files prove of it, and what is in its ΔW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse, scores_of
from lorakit.adapter.hub import local_path, short_name
from lorakit.adapter.output_place import check_new
from lorakit.adapter.site import Site
from lorakit.analysis.amplifying import Amplification, amplification
from lorakit.analysis.checks import has_delta, left_out
from lorakit.analysis.page import Page, check_report, write_page
from lorakit.analysis.report import AdapterFindings, adapter_page, log_of
from lorakit.analysis.spectra import Spectrum, spectrum
from lorakit.analysis.tracing import traces
from lorakit.cli.advise import Loaded, advise
from lorakit.cli.spectra import amplification_lines, part_of, spectrum_lines
from lorakit.cli.verbs import Result
from lorakit.config.verbs import InspectConfig
from lorakit.errors import AdapterFileError, AnalysisError


def run(settings: InspectConfig) -> Result:
    """Read the adapter with every check, describe it, and look into its ΔW."""
    if settings.out is not None:
        check_new(settings.out)
    check_report(html=settings.html, figures=settings.figures)
    adapter = Adapter.load(settings.adapter)
    loaded = _base(settings, adapter)
    spectra, amplified, notes = _found(settings, adapter, loaded)
    advice = advise(settings, adapter, loaded) if settings.advise else None
    facts = {
        "method": adapter.method,
        "parameters": adapter.parameters,
        "size_bytes": adapter.size_bytes,
        "base": adapter.base_name or None,
        "loftq": None if adapter.loftq is None else vars(adapter.loftq),
        "content_hash": adapter.content_hash(),
        "unverified": adapter.unverified,
        "sites": [vars(site) for site in adapter.sites],
        "card": adapter.card,
        "spectrum": {name: each.to_json() for name, each in spectra.items()},
        "amplification": {name: each.to_json() for name, each in amplified.items()},
        "not_shown": list(notes),
        "advice": None if advice is None else {**advice.to_json(), "out": settings.out},
    }
    written = []
    if settings.asks_report:
        found = AdapterFindings(spectra=spectra, amplified=amplified, notes=notes)
        written = write_page(
            _report(settings, adapter, found), html=settings.html, figures=settings.figures
        )
    lines = [repr(adapter), *_lines(adapter)]
    lines += spectrum_lines(adapter, spectra) if spectra else []
    lines += amplification_lines(adapter, amplified) if amplified else []
    lines += [f"not shown: {note}" for note in notes]
    lines += advice.lines() if advice is not None else []
    lines += [f"the smaller adapter is in {settings.out}"] if settings.out is not None else []
    lines += [f"written: {path}" for path in written]
    return Result(text="\n".join(lines), data={**facts, "written": written})


def _report(settings: InspectConfig, adapter: Adapter, found: AdapterFindings) -> Page:
    """The report, also of the run in whose folder the adapter is."""
    folder = local_path(settings.adapter)
    try:
        found = replace(found, traces=traces(folder))
    except AdapterFileError as error:
        found = replace(found, notes=(*found.notes, f"The run's checkpoints: {error}"))
    except AnalysisError:
        pass  # No run's folder, or one whose checkpoints have no ΔW.
    return adapter_page(
        adapter, replace(found, log=log_of(folder)), name=short_name(settings.adapter)
    )


def _base(settings: InspectConfig, adapter: Adapter) -> Loaded | None:
    """The base, where something is asked that needs it."""
    if settings.model is None and settings.data.validation is None:
        return None
    return adapter.load_base(settings.model)


def _found(
    settings: InspectConfig, adapter: Adapter, loaded: Loaded | None
) -> tuple[Mapping[str, Spectrum], Mapping[str, Amplification], tuple[str, ...]]:
    """The spectra, what they amplify where the base is named, and what is not shown."""
    with_base = loaded is not None and settings.model is not None
    notes = left_out(adapter, with_base=with_base)
    # A method without ΔW is no mistake: the rest of the adapter is described.
    if not has_delta(adapter, with_base=with_base):
        return {}, {}, notes
    if loaded is None or not with_base:
        return spectrum(adapter), {}, notes
    model, other = loaded[0], settings.allow_other_base
    spectra = spectrum(adapter, model=model, allow_other_base=other)
    return spectra, amplification(adapter, model, allow_other_base=other), notes


def _lines(adapter: Adapter) -> Iterator[str]:
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in adapter.sites:
        a, b = (tuple(adapter.tensors[f"{site.name}.lora_{end}"].shape) for end in "ab")
        groups.setdefault((part_of(site), b[0], a[1], site.rank, site.scale), []).append(site)
    for (part, rows, columns, rank, scale), sites in groups.items():
        yield f"  {part} {rows}×{columns}, r {rank}, scale {scale:g}: {len(sites)} updates"
    if adapter.copied_modules:
        yield f"  saved in full: {', '.join(adapter.copied_modules)}"
    changed = "" if adapter.loftq is None else f", its layers changed by LoftQ ({adapter.loftq})"
    yield f"base: {adapter.base_name or 'its files do not name it'}{changed}"
    yield from _trained(adapter)
    yield f"size: {adapter.size_bytes / 1e6:.1f} MB, content {adapter.content_hash()[:16]}"
    yield from (f"not verified: {note}" for note in adapter.unverified)


def _trained(adapter: Adapter) -> Iterator[str]:
    """How it was trained, as its card says, where it has one."""
    use, step = TrainedUse.on(adapter.card), adapter.card.get("step")
    if step is None:
        return
    told = ", ".join(f"{name} {value}" for name, value in scores_of(adapter.card).items())
    rows = f"{use.rows_kind} rows of {use.data.train or 'objects in memory'}"
    yield f"trained: {step} steps on {rows}{f'; {told}' if told else ''}"
