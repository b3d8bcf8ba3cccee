"""PEFT's adapters of a base whose weights their start has changed: PiSSA, OLoRA and CorDA.

PEFT puts a part of each weight into A and B and takes it out of the base. What it saves by
default are A and B as they were trained, for the rest of the base, which it makes anew at loading.
Here the base stays: with its weights the start A₀, B₀ is computed again, and the adapter is
[A; A₀] and [B, −B₀], as lorakit's own PiSSA is. CorDA's part depends on texts, too: what PEFT found
out from them is in a file of its own (`CORDA_FILE`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.peft_config import CORDA_FILE, REPEATABLE_INITS
from lorakit.adapter.site import Site
from lorakit.models.base import base_modules, unwrapped
from lorakit.models.quantized_weight import float_weight
from lorakit.upstream.private_names import own_parameters

Start = Callable[[Tensor, Site, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""From a weight (d_out, d_in), the site with rank and scale, and CorDA's tensors: A₀ and B₀."""

_PARTS = ("U_WC", "S_WC", "V_WC")
"""PEFT's names for U (d_out, r), S (r) and V (d_in, r) of a layer, with W ≈ U·S·Vᵀ at full rank."""


def _pissa(matrix: Tensor, site: Site, _cache: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The largest singular values, half of each in A₀ and in B₀ (Meng et al. 2024, section 3)."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return _halves(u[:, : site.rank], s[: site.rank], v[: site.rank], site.scale)


def _olora(matrix: Tensor, site: Site, _cache: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R (Büyükakyüz 2024), which PEFT does not scale."""
    q, r = torch.linalg.qr(matrix)
    return r[: site.rank], q[:, : site.rank]


def _corda(matrix: Tensor, site: Site, cache: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Directions of W·C, C the covariance of a layer's inputs (Yang et al. 2024, section 3.2)."""
    u, s, v = (each.to(matrix.device) for each in _directions(site, cache))
    return _halves(u, s, v.T, site.scale)


def _halves(u: Tensor, s: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A₀ (r, d_in) and B₀ (d_out, r) with scale·B₀·A₀ = U·S·V, half of S in each."""
    root = (s / scale).sqrt()
    return root[:, None] * v, u * root


STARTS: Mapping[str, Start] = dict(zip(REPEATABLE_INITS, (_pissa, _olora, _corda), strict=True))
"""Starts that can be computed again, by PEFT's words for them."""


def of_whole_base(
    adapter: AdapterContent, start: str, base: nn.Module, cache: Mapping[str, Tensor]
) -> tuple[AdapterContent, list[str]]:
    """The adapter for the base as it is, and what is wrong.

    The update of each linear layer has twice the rank, the added half of which does not train.

    Args:
        adapter: A and B as PEFT saved them.
        start: one of `STARTS`.
        base: the model that it was trained on, before PEFT changed its weights.
        cache: the tensors of CorDA's file by their names there; without entries for the others.
    """
    modules = dict(base_modules(unwrapped(base)))
    others = _of_same_weight(modules)
    sites, tensors, problems = [], dict(adapter.tensors), []
    for site in adapter.sites:
        if site.kind == "embedding":
            # PEFT has its usual start there, which leaves the base as it is.
            sites.append(site)
            continue
        problem = _obstacle(site, start, modules.get(site.path), tensors, cache)
        if not problem and site.path in others:
            problem = (
                f"has one weight with {', '.join(others[site.path])} in this base, and PEFT's "
                f"{start} changed it there too, which no A and B of this layer can give back"
            )
        if problem:
            problems.append(f"{site.path}  {problem}")
            continue
        a, b = _start(site, start, modules[site.path], cache)
        for end, first, axis in (("a", a, 0), ("b", -b, 1)):
            name = f"{site.name}.lora_{end}"
            own = tensors[name]
            tensors[name] = torch.cat([own, first.to(own.device, own.dtype)], dim=axis)
        rank = 2 * site.rank
        sites.append(
            replace(site, rank=rank, alpha=site.alpha * _factor(adapter, site), frozen=site.rank)
        )
    note = f"that {start} started from the weights of this base, which is what B₀·A₀ was made of"
    found = replace(
        adapter, sites=tuple(sites), tensors=tensors, unverified=(*adapter.unverified, note)
    )
    return found, problems


def _of_same_weight(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each module whose weight others have, too, the paths of those."""
    by_weight: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = own_parameters(module).get("weight")
        if weight is not None:
            by_weight.setdefault(id(weight), []).append(path)
    return {
        path: [each for each in paths if each != path]
        for paths in by_weight.values()
        if len(paths) > 1
        for path in paths
    }


def _factor(adapter: AdapterContent, site: Site) -> float:
    """By what α grows so that twice the rank has the same scale."""
    rslora = adapter.lora is not None and adapter.lora.use_rslora
    return 2**0.5 if rslora else 2.0


def _obstacle(
    site: Site,
    start: str,
    module: nn.Module | None,
    tensors: Mapping[str, Tensor],
    cache: Mapping[str, Tensor],
) -> str | None:
    """Why the start of an update cannot be computed; None: it can."""
    if module is None:
        return "is not a module of this base"
    kinds = ("linear",) if start == "olora" else ("linear", "transposed")
    if site.kind not in kinds:
        return f"is {site.kind}, for which PEFT has no {start}"
    sizes = tensors[f"{site.name}.lora_b"].shape[0], tensors[f"{site.name}.lora_a"].shape[1]
    found = tuple(_matrix(site, module).shape)
    if found != sizes:
        return f"is of {sizes[0]}×{sizes[1]} in the file, and {found[0]}×{found[1]} in this base"
    return _other_cache(site, _matrix(site, module), cache) if start == "corda" else None


@torch.no_grad()
def _other_cache(site: Site, matrix: Tensor, cache: Mapping[str, Tensor]) -> str | None:
    """Why CorDA's file is not of this layer; None: it may be."""
    names = [f"{site.path}.eigens.{part}" for part in _PARTS]
    shapes = (matrix.shape[0], site.rank), (site.rank,), (matrix.shape[1], site.rank)
    for name, shape in zip(names, shapes, strict=True):
        if name not in cache:
            return f"is not in {CORDA_FILE}, which PEFT made for other layers"
        if (found := tuple(cache[name].shape)) != shape:
            return f"has {name} of shape {found} in {CORDA_FILE}, where {shape} belongs to it"
    u, s, v = (each.to(matrix.device) for each in _directions(site, cache))
    # Uᵀ·W = S·Vᵀ, whatever the texts. For directions of another base the difference is as large as
    # that of any r directions of W; CorDA's smallest ones are lost in the rounding of an inverse.
    expected = s[:, None] * v.T
    usual = matrix.float().norm() * (site.rank / matrix.shape[0]) ** 0.5
    difference = (u.T @ matrix.float() - expected).norm()
    if difference > 0.5 * expected.norm() + 0.1 * usual or (s < 0).any():
        return f"has directions in {CORDA_FILE} that are not of its weight in this base"
    return None


def _directions(site: Site, cache: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V of a layer in float32."""
    u, s, v = (cache[f"{site.path}.eigens.{part}"].float() for part in _PARTS)
    return u, s, v


@torch.no_grad()
def _start(
    site: Site, start: str, module: nn.Module, cache: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    return STARTS[start](_matrix(site, module).float(), site, cache)


def _matrix(site: Site, module: nn.Module) -> Tensor:
    """The weight of a layer as (d_out, d_in)."""
    layer: Any = module
    weight = float_weight(layer).detach()
    return weight.T if site.kind == "transposed" else weight
