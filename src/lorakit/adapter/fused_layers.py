"""Whole-layer updates: the slices of a layer stacked into one A and one B, and split again.

PEFT knows updates of whole layers only. Slices with updates A₁, B₁ and A₂, B₂ become one: A is A₁
over A₂; B has all the layer's rows and is zero but for B₁ in the first slice's rows and the first
columns, and B₂ in the second's rows and the next columns. Then B·A is B₁·A₁ in the first slice's
rows and B₂·A₂ in the second's: the same update, at the sum of the ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapter.expert_layers import joined, on_whole_matrix, parted, row_numbers
from lorakit.adapter.site import Site, scale_of


@dataclass(frozen=True, kw_only=True)
class WholeLayer:
    """One update of one layer as PEFT has it."""

    sites: tuple[Site, ...]
    """The sites that it is made of: one for the whole layer, or the slices of a fused layer."""
    width: int
    """Rows of the stacked A: the sites' ranks, and zeros where no alpha gives the exact scale."""
    alpha: float
    """Numerator of the scale."""
    scale: float
    """The scale of the first site; the others' ratio to it is folded into their B."""

    @property
    def path(self) -> str:
        """The dotted path of the module."""
        return self.sites[0].path

    @property
    def groups(self) -> int:
        """The groups of a convolution."""
        return self.sites[0].groups

    @property
    def rank(self) -> int:
        """PEFT's rank: it gives each group of a convolution its own part of A."""
        return self.width * self.groups

    @property
    def is_plain(self) -> bool:
        """Whether PEFT's A and B are those of the only site."""
        only = self.sites[0]
        if only.is_of_experts or only.kind == "out_proj":
            return False
        return len(self.sites) == self.groups == 1 and only.rows is None and self.width == only.rank


def whole_layers(sites: Sequence[Site], *, use_rslora: bool) -> tuple[WholeLayer, ...]:
    """The sites gathered by layer, in the order of the first site of each."""
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    return tuple(_whole_layer(tuple(parts), use_rslora) for parts in by_path.values())


def _whole_layer(sites: tuple[Site, ...], use_rslora: bool) -> WholeLayer:
    first, groups = sites[0], sites[0].groups
    narrowest = sum(site.rank for site in sites)
    if len(sites) == 1 and groups == 1 and _gives(first.alpha, first, first.rank, use_rslora):
        return WholeLayer(sites=sites, width=narrowest, alpha=first.alpha, scale=first.scale)
    # A rank that is a power of four has an exact alpha, so this ends.
    for width in itertools.count(narrowest):
        for alpha in _alphas_near(first.scale, width * groups, use_rslora):
            if _gives(alpha, first, width * groups, use_rslora):
                return WholeLayer(sites=sites, width=width, alpha=alpha, scale=first.scale)
    raise AssertionError("unreachable")


def _gives(alpha: float, site: Site, rank: int, use_rslora: bool) -> bool:
    return scale_of(rank, alpha, use_rslora=use_rslora) == site.scale


def _alphas_near(scale: float, rank: int, use_rslora: bool) -> tuple[float, ...]:
    guess = scale * (math.sqrt(rank) if use_rslora else rank)
    return float(round(guess)), guess, math.nextafter(guess, 0), math.nextafter(guess, math.inf)


def obstacles(layer: WholeLayer, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The reasons why a layer's sites have no exact whole-layer update; none if they have one."""
    for site in layer.sites:
        b = tensors[f"{site.name}.lora_b"]
        ratio = site.scale / layer.scale
        if site.rows is not None and site.layer_rows is None:
            yield f"{site.name}: the number of rows of the whole layer is not known"
        if math.frexp(ratio)[0] != 0.5 or ratio * layer.scale != site.scale:
            yield f"{site.name}: its scale is not {layer.scale} times a power of two"
        elif not torch.equal(b * ratio / ratio, b):
            yield f"{site.name}: its scale cannot be folded into B without rounding"
        if b.dtype != tensors[f"{layer.sites[0].name}.lora_b"].dtype:
            yield f"{site.name}: its precision is not that of the layer's other slices"


def _ratio(site: Site, layer: WholeLayer) -> float:
    """The factor on a site's B in the file.

    PEFT up to 0.21 adds the update of an nn.MultiheadAttention's output projection twice.
    """
    return site.scale / layer.scale / (2 if site.kind == "out_proj" else 1)


def stack(layer: WholeLayer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of a whole layer.

    Args:
        layer: what is stacked.
        tensors: `<site>.lora_a` and `<site>.lora_b` of its sites.

    Returns:
        A (rank, d_in) and B (layer rows, rank); of a convolution A (rank, c_in, *kernel) and
        B (c_out, rank / groups, 1, …); of experts A (experts·rank, d_in) and B (layer rows,
        rank·experts).
    """
    first_a, first_b = (tensors[f"{layer.sites[0].name}.lora_{end}"] for end in "ab")
    if layer.is_plain:
        return first_a, first_b
    if layer.sites[0].is_of_experts:
        return joined(*_whole_matrices(layer, tensors))
    rows = layer.sites[0].layer_rows or first_b.shape[0]
    a = first_a.new_zeros(layer.width, *first_a.shape[1:])
    b = first_b.new_zeros(rows, layer.width, *first_b.shape[2:])
    start = 0
    for site in layer.sites:
        columns = slice(start, start + site.rank)
        a[columns] = tensors[f"{site.name}.lora_a"]
        part = tensors[f"{site.name}.lora_b"] * _ratio(site, layer)
        for (first, last), block in _row_blocks(site, part):
            b[first:last, columns] = block
        start += site.rank
    return _spread(a, layer.groups), b


def stack_biases(layer: WholeLayer, tensors: Mapping[str, Tensor]) -> Tensor:
    """The bias of a whole layer's B, (layer rows,), zero beside its slices."""
    first = tensors[f"{layer.sites[0].name}.lora_bias"]
    if len(layer.sites) == 1 and layer.sites[0].rows is None:
        return first
    bias = first.new_zeros(layer.sites[0].layer_rows or first.shape[0])
    for site in layer.sites:
        part = tensors[f"{site.name}.lora_bias"] * _ratio(site, layer)
        for (start, stop), block in _row_blocks(site, part):
            bias[start:stop] = block
    return bias


def unstack_biases(layer: WholeLayer, bias: Tensor) -> dict[str, Tensor] | None:
    """The biases that `stack_biases` makes one from, or None if no biases give this one."""
    tensors = {}
    for site in layer.sites:
        ranges = site.rows or ((0, len(bias)),)
        part = torch.cat([bias[start:stop] for start, stop in ranges])
        tensors[f"{site.name}.lora_bias"] = part / _ratio(site, layer)
    return tensors if torch.equal(stack_biases(layer, tensors), bias) else None


def _whole_matrices(layer: WholeLayer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One A (experts, rank, d_in) and one B (experts, layer rows, rank) of a layer's sites."""
    parts = []
    for site in layer.sites:
        a, b = (tensors[f"{site.name}.lora_{end}"] for end in "ab")
        index = None if site.rows is None else row_numbers(site.rows, b.device)
        parts.append((a, b * _ratio(site, layer), index))
    rows = layer.sites[0].layer_rows or parts[0][1].shape[1]
    return on_whole_matrix(parts, layer.width, rows)


def _of_experts(layer: WholeLayer, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The tensors of the sites of experts, from PEFT's A and B."""
    wide_a, wide_b = parted(a, b, a.shape[0] // layer.width)
    tensors, start = {}, 0
    for site in layer.sites:
        columns = slice(start, start + site.rank)
        part = wide_b[:, :, columns]
        if site.rows is not None:
            part = part[:, row_numbers(site.rows, b.device)]
        tensors[f"{site.name}.lora_a"] = wide_a[:, columns].contiguous()
        tensors[f"{site.name}.lora_b"] = (part / _ratio(site, layer)).contiguous()
        start += site.rank
    return tensors


def _row_blocks(site: Site, b: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Each range of a site's rows in its layer, with the rows of B for that range."""
    start = 0
    for first, last in site.rows or ((0, b.shape[0]),):
        yield (first, last), b[start : start + last - first]
        start += last - first


def _spread(a: Tensor, groups: int) -> Tensor:
    """A repeated for each group along the diagonal: (groups·width, groups·inner, …)."""
    if groups == 1:
        return a
    width, inner = a.shape[:2]
    wide = a.new_zeros(groups * width, groups * inner, *a.shape[2:])
    for group in range(groups):
        wide[group * width :, group * inner :][:width, :inner] = a
    return wide


def unstack(layer: WholeLayer, a: Tensor, b: Tensor) -> dict[str, Tensor] | None:
    """The tensors that `stack` makes A and B from, or None if no tensors give these A and B."""
    if layer.is_plain:
        name = layer.sites[0].name
        return {f"{name}.lora_a": a, f"{name}.lora_b": b}
    if layer.sites[0].is_of_experts:
        tensors = _of_experts(layer, a, b)
        again = stack(layer, tensors)
        return tensors if torch.equal(again[0], a) and torch.equal(again[1], b) else None
    tensors, start = {}, 0
    inner = a.shape[1] // layer.groups
    for site in layer.sites:
        columns = slice(start, start + site.rank)
        ranges = site.rows or ((0, b.shape[0]),)
        part = torch.cat([b[first:last, columns] for first, last in ranges])
        tensors[f"{site.name}.lora_a"] = a[columns, :inner].contiguous()
        tensors[f"{site.name}.lora_b"] = part / _ratio(site, layer)
        start += site.rank
    again = stack(layer, tensors)
    return tensors if torch.equal(again[0], a) and torch.equal(again[1], b) else None
