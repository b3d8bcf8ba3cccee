"""What a method wants to train of a model, before anything is changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lorakit.adapter.site import Site
from lorakit.config.methods import LoRAConfig
from lorakit.methods.component import Part
from lorakit.methods.lora.lora import parameter_shapes
from lorakit.models.roles import Target


@dataclass(frozen=True)
class Match:
    """One row of the match table: a site, and the layer it found."""

    site: Site
    role: str | None
    """What the layer is called in its family, where that is known."""
    shape: tuple[int, int]
    """(d_out, d_in) of the adapted matrix."""
    parameters: int
    """Trained values of the update."""


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What one method trains."""

    matches: tuple[Match, ...] = ()
    """Low-rank updates."""
    biases: tuple[str, ...] = ()
    """Modules whose bias is trained."""
    copies: tuple[str, ...] = ()
    """Modules trained as full copies."""
    parts: tuple[Part, ...] = ()
    """Everything else."""


def match_of(layer: nn.Module, target: Target | None, site: Site, config: LoRAConfig) -> Match:
    """The row of the match table for a site on a layer."""
    a, b = parameter_shapes(layer, site)
    role, shape = target.role if target else site.role, (b[0], math.prod(a[1:]))
    of_rank = b[0] if config.freeze_a else b[0] + math.prod(a[1:])
    lengths = b[0] if config.use_dora else 0
    return Match(site, role, shape, (site.rank - site.frozen) * of_rank + lengths)
