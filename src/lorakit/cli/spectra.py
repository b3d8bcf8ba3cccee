"""The text of what inspect finds in ΔW: spectra, what they amplify, and advice on ranks."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TypeVar

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.analysis.amplifying import Amplification
from lorakit.analysis.spectra import Spectrum
from lorakit.cli.columns import columns

V = TypeVar("V")


def part_of(site: Site) -> str:
    """What a site's layer is called among the others of its block: its role, or its last name."""
    return site.role or site.path.rpartition(".")[2]


def by_part(adapter: Adapter, found: Mapping[str, V]) -> dict[str, list[V]]:
    """What was found at each site, by the part of the block; whole weights by their last name."""
    parts = {site.name: part_of(site) for site in adapter.sites}
    groups: dict[str, list[V]] = {}
    for name, value in found.items():
        groups.setdefault(parts.get(name, name.rpartition(".")[2]), []).append(value)
    return groups


def spectrum_lines(adapter: Adapter, found: Mapping[str, Spectrum]) -> Iterator[str]:
    """A table of the spectra, one line for each part of the blocks."""
    relative = any(each.relative_norm is not None for each in found.values())
    head = ["ΔW (median, most)", "sites", "rank", "effective rank", "stable rank", "‖ΔW‖"]
    rows = [head + (["‖ΔW‖/‖W‖"] if relative else [])]
    for part, spectra in by_part(adapter, found).items():
        row = [
            part,
            str(len(spectra)),
            _range([each.rank for each in spectra]),
            _both([each.effective_rank for each in spectra], ".1f"),
            _both([each.stable_rank for each in spectra], ".1f"),
            _both([each.norm for each in spectra], ".3g"),
        ]
        shares = [each.relative_norm for each in spectra if each.relative_norm is not None]
        rows.append(row + ([_both(shares, ".2%") if shares else "-"] if relative else []))
    yield from columns(rows)
    idle = [name for name, each in found.items() if not each.numerical_rank]
    if idle:
        yield f"ΔW is 0 at {len(idle)} of {len(found)} sites, first at {idle[0]}"


def amplification_lines(adapter: Adapter, found: Mapping[str, Amplification]) -> Iterator[str]:
    """A table of the amplification, one line for each part of the blocks: Table 7's columns."""
    rows = [["‖UᵀWV‖ (median)", "in ΔW's directions", "in W's", "in random ones", "‖W‖", "factor"]]
    for part, each in by_part(adapter, found).items():
        factors = [one.factor for one in each if one.factor is not None]
        rows.append(
            [
                part,
                f"{median(one.in_delta for one in each):.3g}",
                f"{median(one.in_weight for one in each):.3g}",
                f"{median(one.in_random for one in each):.3g}",
                f"{median(one.weight_norm for one in each):.3g}",
                _both(factors, ".3g") if factors else "-",
            ]
        )
    yield from columns(rows)
    randomised = sum(one.svd == "randomised" for one in found.values())
    if randomised:
        yield f"W's directions are from a randomised SVD at {randomised} of {len(found)} sites"


def rank_lines(before: Adapter, after: Adapter) -> Iterator[str]:
    """The ranks of an adapter and of a smaller one, for each part of the blocks."""
    was = by_part(before, {site.name: site.rank for site in before.sites})
    now = by_part(after, {site.name: site.rank for site in after.sites})
    rows = [["rank", "was", "is", "median"]]
    for part, ranks in was.items():
        rows.append([part, _range(ranks), _range(now[part]), f"{median(now[part]):g}"])
    yield from columns(rows)


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _both(numbers: Sequence[float], form: str) -> str:
    """The median and the largest of some numbers."""
    return f"{median(numbers):{form}}, {max(numbers):{form}}"
