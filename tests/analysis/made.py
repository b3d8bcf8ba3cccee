"""Adapters made of given matrices, and their ΔW as plain matrices."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import lorakit as lk
from lorakit.adapter.site import Site

Factors = tuple[Tensor, Tensor]
"""A (rank, d_in) and B (d_out, rank)."""


def random(*shape: int, seed: int) -> Tensor:
    """A Gaussian matrix in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(size: int, columns: int, *, seed: int) -> Tensor:
    """Random orthonormal columns, (size, columns)."""
    return torch.linalg.qr(random(size, columns, seed=seed)).Q


def planted(d_out: int, d_in: int, values: list[float], *, seed: int) -> Factors:
    """A and B whose product has these singular values, in random directions."""
    s = torch.tensor(values, dtype=torch.float64)
    u = orthonormal(d_out, len(values), seed=seed)
    v = orthonormal(d_in, len(values), seed=seed + 1)
    return v.T.contiguous(), (u * s).contiguous()


def adapter_of(factors: Mapping[str, Factors], *, alpha: float | None = None, **facts: Any) -> Any:
    """An adapter with these factors at layers of these paths; alpha None: the scale 1."""
    sites = tuple(
        Site(path=path, rank=len(a), alpha=alpha or float(len(a)), scale=(alpha or len(a)) / len(a))
        for path, (a, _) in factors.items()
    )
    tensors = {f"{path}.lora_a": a for path, (a, _) in factors.items()}
    tensors |= {f"{path}.lora_b": b for path, (_, b) in factors.items()}
    config = lk.LoRAConfig(rank=max(s.rank for s in sites), targets=tuple(factors))
    return lk.Adapter(**{"configs": (config,), "sites": sites, "tensors": tensors, **facts})


def in_float64(adapter: lk.Adapter) -> lk.Adapter:
    """The same adapter with tensors in float64, so that nothing is rounded to its precision."""
    return replace(adapter, tensors={n: t.double() for n, t in adapter.tensors.items()})


def dense(adapter: lk.Adapter) -> dict[str, Tensor]:
    """Scale·B·A of each layer as a matrix in float64; a slice has zeros in the other rows."""
    found: dict[str, Tensor] = {}
    for site in adapter.sites:
        a, b = (adapter.tensors[f"{site.name}.lora_{x}"].flatten(1).double() for x in "ab")
        delta = site.scale * (b @ a)
        if site.rows is not None:
            rows = [row for start, stop in site.rows for row in range(start, stop)]
            whole = torch.zeros(site.layer_rows or 0, a.shape[1], dtype=torch.float64)
            whole[rows] = delta
            delta = whole
        found[site.path] = found.get(site.path, torch.zeros_like(delta)) + delta
    return found
