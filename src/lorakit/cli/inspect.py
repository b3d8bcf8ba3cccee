"""The verb inspect: what an adapter is, and what its files prove of it; no model is loaded."""

from collections.abc import Iterator
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.site import Site
from lorakit.cli.verbs import Result
from lorakit.config.verbs import InspectConfig


def run(settings: InspectConfig) -> Result:
    """Read the adapter with every check, and describe it."""
    adapter = Adapter.load(settings.adapter)
    facts = {
        "method": adapter.method,
        "parameters": adapter.parameters,
        "size_bytes": adapter.size_bytes,
        "base": adapter.base_name or None,
        "content_hash": adapter.content_hash(),
        "unverified": adapter.unverified,
    }
    return Result(
        text="\n".join([repr(adapter), *_lines(adapter)]),
        data={**facts, "sites": [vars(site) for site in adapter.sites], "card": adapter.card},
    )


def _lines(adapter: Adapter) -> Iterator[str]:
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in adapter.sites:
        name = site.role or site.path.rpartition(".")[2]
        a, b = (tuple(adapter.tensors[f"{site.name}.lora_{end}"].shape) for end in "ab")
        groups.setdefault((name, b[0], a[1], site.rank, site.scale), []).append(site)
    for (part, rows, columns, rank, scale), sites in groups.items():
        yield f"  {part} {rows}×{columns}, r {rank}, scale {scale:g}: {len(sites)} updates"
    if adapter.copied_modules:
        yield f"  saved in full: {', '.join(adapter.copied_modules)}"
    yield f"base: {adapter.base_name or 'its files do not name it'}"
    yield from _trained(adapter)
    yield f"size: {adapter.size_bytes / 1e6:.1f} MB, content {adapter.content_hash()[:16]}"
    yield from (f"not verified: {note}" for note in adapter.unverified)


def _trained(adapter: Adapter) -> Iterator[str]:
    """How it was trained, as its card says, where it has one."""
    use, step = TrainedUse.on(adapter.card), adapter.card.get("step")
    if step is None:
        return
    scores = adapter.card.get("scores") or {}
    told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    rows = f"{use.rows_kind} rows of {use.data.train or 'objects in memory'}"
    yield f"trained: {step} steps on {rows}{f'; {told}' if told else ''}"
