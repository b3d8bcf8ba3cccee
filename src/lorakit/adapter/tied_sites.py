"""Sites that have the A and B of another, since their layers have one weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapter.site import Site


def is_turned(site: Site, owner: Site) -> bool:
    """Whether a site's matrix is the transpose of that of the site whose A and B it has."""
    return (site.kind == "embedding") != (owner.kind == "embedding")


def tensors_of_tied(site: Site, owner: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The A and B that a tied site must have, by their names in an adapter."""
    a, b = (tensors[f"{owner.name}.lora_{end}"] for end in "ab")
    own = (b.mT, a.mT) if is_turned(site, owner) else (a, b)
    return {f"{site.name}.lora_{end}": each for end, each in zip("ab", own, strict=True)}


def are_equal(site: Site, owner: Site, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a site's A and B are those of another site, turned where they must be.

    What is missing is nobody's difference.
    """
    if any(f"{each.name}.lora_{end}" not in tensors for each in (site, owner) for end in "ab"):
        return True
    wanted = tensors_of_tied(site, owner, tensors)
    return all(torch.equal(tensors[name], each) for name, each in wanted.items())


def tied_by_values(sites: Iterable[Site], tensors: Mapping[str, Tensor]) -> Iterator[Site]:
    """Yield sites, of which those linear ones are tied that have the A and B of an embedding."""
    every = list(sites)
    owners = [site for site in every if site.kind == "embedding"]
    for site in every:
        owner = next((each for each in owners if _is_tied(site, each, tensors)), None)
        yield site if owner is None else replace(site, tied_to=owner.path)


def _is_tied(site: Site, owner: Site, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a linear site has an embedding's A and B, and its scale."""
    is_alike = (site.rank, site.scale) == (owner.rank, owner.scale) and site.rows is None
    return site.kind == "linear" and is_alike and are_equal(site, owner, tensors)
