"""What the settings of methods mean for one model: the match table, before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lorakit.adapter import Site
from lorakit.errors import ConfigError, TargetError, did_you_mean
from lorakit.method_config import (
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    LoRAConfig,
    MethodConfig,
    PrefixConfig,
    combination_problems,
)
from lorakit.methods import bitfit, bottleneck, full, lora_places, prefix
from lorakit.methods.claims import Claims, Match
from lorakit.methods.part import Part
from lorakit.models.base import base_modules, base_parameters
from lorakit.models.quantized import quantized_within
from lorakit.models.roles import task_heads

CLAIMS: Mapping[type[MethodConfig], Callable[[nn.Module, Any], Claims]] = {
    LoRAConfig: lora_places.claim,
    FullConfig: full.claim,
    BitFitConfig: bitfit.claim,
    PrefixConfig: prefix.claim,
    BottleneckConfig: bottleneck.claim,
}
"""What finds out what a method trains of a model, by the class of its settings."""


@dataclass(frozen=True)
class Plan:
    """What settings mean for one model, before anything is changed."""

    matches: tuple[Match, ...]
    biases: tuple[str, ...] = ()
    """Modules whose bias is trained."""
    copies: tuple[str, ...] = ()
    """Modules trained as full copies."""
    extra_parameters: int = 0
    """Trained values in biases and copies."""
    parts: tuple[Part, ...] = ()
    """What else is trained."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Return every low-rank update."""
        return tuple(match.site for match in self.matches)

    @property
    def parameters(self) -> int:
        """Return the number of values that are trained."""
        found = sum(match.parameters for match in self.matches) + self.extra_parameters
        return found + sum(math.prod(s) for part in self.parts for s in part.shapes.values())

    def __str__(self) -> str:
        """Return the match table as text."""
        head = ("module", "role", "shape", "rank", "scale", "parameters")
        rows = [head, *(_table_row(match) for match in self.matches)]
        rows += [(path, "bias", "", "", "", "") for path in self.biases]
        rows += [(path, "full copy", "", "", "", "") for path in self.copies]
        rows += [_part_row(part) for part in self.parts]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.parameters:,} parameters are trained"])


def _table_row(match: Match) -> tuple[str, ...]:
    site, shape = match.site, match.shape
    size = f"{shape[0]}x{shape[1]}"
    role, rank = match.role or "", str(site.rank)
    return site.name, role, size, rank, f"{site.scale:g}", f"{match.parameters:,}"


def _part_row(part: Part) -> tuple[str, ...]:
    size = "+".join("x".join(map(str, shape)) for shape in part.shapes.values())
    number = sum(math.prod(shape) for shape in part.shapes.values())
    return part.path, part.what, size, "", "", f"{number:,}"


def as_configs(what: MethodConfig | Sequence[MethodConfig]) -> tuple[MethodConfig, ...]:
    """Return the settings of one method or of several as a tuple.

    Raises:
        ConfigError: they cannot be combined.
    """
    configs = (what,) if isinstance(what, MethodConfig) else tuple(what)
    problems = combination_problems([config.method for config in configs])
    if problems:
        raise ConfigError.listing("these methods cannot be combined", problems)
    return configs


def plan(model: nn.Module, what: MethodConfig | Sequence[MethodConfig]) -> Plan:
    """Return what `attach(model, what)` would train; nothing is changed.

    Raises:
        ConfigError: the methods cannot be combined.
        TargetError: a name in the settings matches nothing, or a layer twice; or the model lacks
            what a method needs.
    """
    configs = as_configs(what)
    claims = [CLAIMS[type(config)](model, config) for config in configs]
    copies = dict.fromkeys(path for claim in claims for path in claim.copies)
    for config in configs:
        copies |= dict.fromkeys(_modules_to_save(model, config.modules_to_save))
    _check_float(model, copies)
    matches = tuple(match for claim in claims for match in claim.matches)
    _check_apart(copies, [match.site.path for match in matches])
    biases = dict.fromkeys(path for claim in claims for path in claim.biases)
    own = tuple(path for path in biases if not any(_is_in(path, copy) for copy in copies))
    parts = tuple(part for claim in claims for part in claim.parts)
    return completed(model, matches, own, tuple(copies), parts)


def parts_of(model: nn.Module, configs: Iterable[MethodConfig]) -> tuple[Part, ...]:
    """Return what methods other than LoRA add to a model."""
    others = (config for config in configs if not isinstance(config, LoRAConfig))
    return tuple(part for config in others for part in CLAIMS[type(config)](model, config).parts)


def completed(
    model: nn.Module,
    found: tuple[Match, ...],
    biases: Sequence[str],
    copies: Sequence[str],
    parts: tuple[Part, ...],
) -> Plan:
    """Return a plan with the number of values in its biases and copies."""
    extra = sum(cast(Tensor, model.get_submodule(path).bias).numel() for path in biases)
    extra += sum(p.numel() for c in copies for _, p in base_parameters(model.get_submodule(c)))
    return Plan(found, tuple(biases), tuple(copies), extra, parts)


def _modules_to_save(model: nn.Module, words: Sequence[str]) -> list[str]:
    names = [path for path, _ in base_modules(model)]
    paths: list[str] = []
    for word in words:
        if word == "auto":
            paths += task_heads(model)
            continue
        found = [path for path in names if path == word or path.endswith(f".{word}")]
        if not found:
            leaves = sorted({path.rpartition(".")[2] for path in names if path})
            hint = did_you_mean(word, leaves)
            raise TargetError(f"modules_to_save: no module is called {word!r}{hint}")
        paths += [path for path in found if path not in paths]
    return paths


def _check_apart(copies: Iterable[str], adapted: Sequence[str]) -> None:
    """Refuse low-rank updates of what is copied in full.

    Raises:
        TargetError: there are such.
    """
    clash = [copy for copy in copies if any(_is_in(path, copy) for path in adapted)]
    if clash:
        raise TargetError(f"{clash[0]} would be copied in full and adapted too: leave one out")


def _check_float(model: nn.Module, copies: Iterable[str]) -> None:
    """Refuse full copies of what is held in few bits: only floats can be trained.

    Raises:
        TargetError: there are such.
    """
    held = [path for path in copies if quantized_within(model.get_submodule(path)) is not None]
    if held:
        shown = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        raise TargetError(
            f"{shown or 'the model'} would be copied and trained in full, but its weights are "
            "quantised: load the base without quantize, or use a method that adds weights (lora)"
        )


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def short_names(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """Return the paths' last parts if they name exactly the adapted layers, else the paths."""
    chosen = {site.path for site in sites}
    leaves = {path.rpartition(".")[2] for path in chosen}
    named = {path for path, _ in base_modules(model) if path.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves if named == chosen else chosen))
