"""Sites by layer and module: the rows and columns of a heat map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SiteLocation:
    """Where a site is in its model."""

    layer: str
    """The number of its block, after the path of the blocks where a model has several."""
    module: str
    """The end of its path, as long as tells it from others; the whole path outside of blocks."""


@dataclass(frozen=True, kw_only=True)
class ByLayer:
    """Sites by layer and module."""

    places: Mapping[str, SiteLocation]
    """By the site's name."""

    @classmethod
    def of(cls, sites: Iterable[str]) -> ByLayer:
        """The places of sites, by their names."""
        split = {site: _split(site) for site in sites}
        stacks = {stack for stack, number, _ in split.values() if number}
        modules = {module for _, number, module in split.values() if number}
        short = {module: _short(module, modules) for module in modules}
        places = {
            site: SiteLocation(
                layer=number if len(stacks) < 2 or not number else f"{stack} {number}",
                module=short[module] if number else module,
            )
            for site, (stack, number, module) in split.items()
        }
        return cls(places=places)

    @property
    def layers(self) -> list[str]:
        """The layers in the order of the sites; "" where a site is in none."""
        return list(dict.fromkeys(place.layer for place in self.places.values()))

    @property
    def modules(self) -> list[str]:
        """The modules in the order of the sites."""
        return list(dict.fromkeys(place.module for place in self.places.values()))

    @property
    def middle(self) -> str:
        """The layer in the middle."""
        return self.layers[len(self.layers) // 2]

    def sites_of(self, module: str) -> dict[str, str]:
        """The sites of a module, by layer."""
        return {p.layer: site for site, p in self.places.items() if p.module == module}

    def grid(
        self, values: Mapping[str, T], number: Callable[[T], float | None]
    ) -> Sequence[Sequence[float | None]]:
        """A number of each site by layer and module; None where there is no site.

        Args:
            values: by the site's name.
            number: of one of them.
        """
        at = {(p.layer, p.module): site for site, p in self.places.items()}
        return [
            [
                number(values[at[layer, module]]) if (layer, module) in at else None
                for module in self.modules
            ]
            for layer in self.layers
        ]


def _split(site: str) -> tuple[str, str, str]:
    """The path of the blocks, the number of one, and the path in it, of a site's name."""
    parts = site.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or at == len(parts) - 1:
        return "", "", site
    return ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])


def _short(module: str, others: set[str]) -> str:
    """The shortest end of a path that no other path has."""
    parts = module.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not any(each != module and f".{each}".endswith(f".{end}") for each in others):
            return end
    return module
