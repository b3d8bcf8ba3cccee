"""Layers that are not used as others: weights read without a call, inputs that all rows share."""

from __future__ import annotations

from torch import nn

from lorakit.models.base import base_modules
from lorakit.models.families import FAMILIES


def direct_reads(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the parameters that are read outside of any layer's call, by their module's path.

    DeBERTa's relative positions are the weight of an embedding that is never called.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    found: dict[str, tuple[str, ...]] = {}
    for path, module in base_modules(model) if family else ():
        for end, names in family.direct.items() if family else ():
            own = tuple(name for name in names if module._parameters.get(name) is not None)
            if own and _ends_with(path, end):
                found[path] = own
    return found


def rowless_layers(model: nn.Module) -> frozenset[str]:
    """Return the paths of the layers whose input all rows of a batch share."""
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    ends = family.rowless if family else ()
    paths = (path for path, _ in base_modules(model))
    return frozenset(path for path in paths if any(_ends_with(path, end) for end in ends))


def _ends_with(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")
