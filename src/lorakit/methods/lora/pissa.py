"""Frozen factors: an adapter holds them behind the trained ones, a model keeps them apart.

PiSSA needs them: its update is scale·(B·A − B₀·A₀), so that it is none at the start. In an adapter,
and for other tools, that is one update of twice the rank, with [A; A₀] and [B, −B₀]; in training
the optimizer sees A and B alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorakit.adapter.site import Site


def split_frozen_factors(
    sites: Iterable[Site], tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """An adapter's tensors with its frozen factors under names of their own.

    `<site>.lora_a` (rank, …) becomes `<site>.lora_a` and `<site>.frozen_a`, B likewise.
    """
    divided: dict[str, Tensor] = {}
    for site in sites:
        if site.frozen:
            sizes = [site.rank - site.frozen, site.frozen]
            for end, axis in (("a", 0), ("b", 1)):
                trained, frozen = tensors[f"{site.name}.lora_{end}"].split(sizes, dim=axis)
                divided[f"{site.name}.lora_{end}"] = trained.contiguous()
                divided[f"{site.name}.frozen_{end}"] = frozen.contiguous()
    return {**tensors, **divided} if divided else tensors


def join_frozen_factors(
    sites: Iterable[Site], tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """An adapter's tensors, in which the frozen factors are joined to the trained ones."""
    joined = dict(tensors)
    for site in sites:
        if site.frozen:
            for end, axis in (("a", 0), ("b", 1)):
                frozen = joined.pop(f"{site.name}.frozen_{end}")
                name = f"{site.name}.lora_{end}"
                joined[name] = torch.cat([joined[name], frozen], dim=axis)
    return joined
