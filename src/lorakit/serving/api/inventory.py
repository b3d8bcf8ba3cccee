"""The adapters of a server in figures: those that answer, and those in its folder."""

from __future__ import annotations

from typing import Any

from lorakit.serving.api.keys import Rights
from lorakit.serving.api.metrics import Metrics
from lorakit.serving.names import Loaded, Names


def inventory(names: Names[Any], metrics: Metrics, rights: Rights) -> dict[str, Any]:
    """The base, and of the adapters that a key may ask those that answer, and those that can be
    loaded."""
    loaded = names.adapters
    resident = set(names.resident)
    held = {each.folder for each in loaded.values()}
    return {
        "object": "list",
        "base": {"name": names.name, "requests": metrics.answered(names.name)},
        "loads": names.places.folder is not None and rights.load,
        "data": [
            _shown(name, each) | {"in_memory": name in resident, "requests": metrics.answered(name)}
            for name, each in loaded.items()
            if rights.may_ask(name)
        ],
        "not_loaded": [
            place.name
            for place in names.places.found()
            if place not in held and rights.may_ask(place.name)
        ],
    }


def _shown(name: str, loaded: Loaded) -> dict[str, Any]:
    record = loaded.record
    return {
        "name": name,
        "folder": str(loaded.folder),
        "method": record.method,
        "ranks": sorted({site.rank for site in record.sites}),
        "updates": len(record.sites),
        "size_bytes": loaded.size_bytes,
        "load_s": round(loaded.load_s, 4),
        "base": loaded.base,
        "content_hash": loaded.content_hash,
    }
