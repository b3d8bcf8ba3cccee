"""The verb compare: whether two adapters change the same layers, in the same directions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.hub import short_name
from lorakit.analysis.comparing import Comparison, SiteComparison, compare
from lorakit.analysis.page import check_report, write_page
from lorakit.analysis.report_of_two import comparison_page
from lorakit.cli.columns import columns
from lorakit.cli.spectra import by_part
from lorakit.cli.verbs import Result
from lorakit.config.verbs import CompareConfig


def run(settings: CompareConfig) -> Result:
    """Compare the two, site by site, and show the median of each part of the blocks."""
    check_report(html=settings.html, figures=settings.figures)
    first, second = Adapter.load(settings.adapter), Adapter.load(settings.other)
    found = compare(first, second, allow_other_base=settings.allow_other_base)
    written = []
    if settings.asks_report:
        page = comparison_page(first, second, found, names=_names(settings))
        written = write_page(page, html=settings.html, figures=settings.figures)
    lines = [repr(first), repr(second), *_lines(first, found)]
    return Result(
        text="\n".join([*lines, *(f"written: {path}" for path in written)]),
        data={
            "adapters": [settings.adapter, settings.other],
            "content_hashes": [first.content_hash(), second.content_hash()],
            "written": written,
            **found.to_json(),
        },
    )


def _names(settings: CompareConfig) -> tuple[str, str]:
    """What the two are called: as their folders are, or by their paths where these are the same."""
    first, second = short_name(settings.adapter), short_name(settings.other)
    return (first, second) if first != second else (str(settings.adapter), str(settings.other))


def _lines(first: Adapter, found: Comparison) -> Iterator[str]:
    yield (
        f"{len(found.sites)} sites in both, {len(found.only_first)} in the first alone, "
        f"{len(found.only_second)} in the second alone"
    )
    yield (
        f"ΔW of all sites: cosine {_number(found.cosine, '.3f')}, "
        f"relative difference {_number(found.relative_difference, '.3f')}"
    )
    head = ["median", "sites", "φ(1, 1) of A", "φ(r, r) of A", "by chance", "φ(r, r) of B"]
    rows = [[*head, "least angle of A", "cosine of ΔW", "difference"]]
    sizes = {site.name: _width(first, site.name) for site in first.sites}
    pairs = {name: (each, sizes[name]) for name, each in found.sites.items()}
    for part, each in by_part(first, pairs).items():
        rows.append([part, str(len(each)), *_row(each)])
    yield from columns(rows)
    if found.without_magnitudes:
        yield "DoRA's magnitudes are not compared: ΔW is scale·B·A here"


def _row(pairs: list[tuple[SiteComparison, int]]) -> Iterator[str]:
    sites = [site for site, _ in pairs]
    yield _median([_entry(site, 0) for site in sites])
    yield _median([_entry(site, -1) for site in sites])
    # The expected φ of random directions is max(i, j) of the width.
    yield _median([max(site.similarity_a.shape) / width for site, width in pairs])
    yield _median([_entry(site, -1, side="b") for site in sites])
    angles = [site.angles_a[0].item() if len(site.angles_a) else None for site in sites]
    yield _median([None if a is None else math.degrees(a) for a in angles], form=".1f", unit="°")
    yield _median([site.cosine for site in sites])
    yield _median([site.relative_difference for site in sites])


def _entry(site: SiteComparison, at: int, *, side: str = "a") -> float | None:
    phi = site.similarity_a if side == "a" else site.similarity_b
    return phi[at, at].item() if phi.numel() else None


def _median(values: list[float | None], *, form: str = ".3f", unit: str = "") -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):{form}}{unit}" if known else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _width(adapter: Adapter, name: str) -> int:
    """The columns d_in of a site's A."""
    return adapter.tensors[f"{name}.lora_a"][0].numel()
