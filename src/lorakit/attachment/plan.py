"""What the settings of methods mean for one model: the match table, before anything changes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from lorakit.adapter.site import Site
from lorakit.config.methods import (
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    LoRAConfig,
    MethodConfig,
    PrefixConfig,
    combination_problems,
)
from lorakit.errors import ConfigError, TargetError, did_you_mean
from lorakit.methods import bitfit, bottleneck, full
from lorakit.methods.claims import Claims, Match, match_of
from lorakit.methods.component import Part
from lorakit.methods.lora import targets as lora_places
from lorakit.methods.lora.eva import SingularVectors, moved_ranks
from lorakit.methods.prompt import prefix
from lorakit.models.base import base_modules, base_parameters
from lorakit.models.paths import is_within, outermost
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
        """Every low-rank update."""
        return tuple(match.site for match in self.matches)

    @property
    def parameters(self) -> int:
        """The number of values that are trained."""
        found = sum(match.parameters for match in self.matches) + self.extra_parameters
        return found + sum(math.prod(s) for part in self.parts for s in part.shapes.values())

    def __str__(self) -> str:
        """The match table as text."""
        head = ("module", "role", "shape", "rank", "scale", "parameters")
        rows = [head, *(_table_row(match) for match in self.matches)]
        rows += _alike((path, "bias", "") for path in self.biases)
        rows += _alike((path, "full copy", "") for path in self.copies)
        rows += _alike(map(_part_row, self.parts))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.parameters:,} parameters are trained"])


def _table_row(match: Match) -> tuple[str, ...]:
    site, shape = match.site, match.shape
    size = f"{shape[0]}x{shape[1]}"
    role, rank = match.role or "", str(site.rank)
    return site.name, role, size, rank, f"{site.scale:g}", f"{match.parameters:,}"


def _part_row(part: Part) -> tuple[str, str, str]:
    size = "+".join("x".join(map(str, shape)) for shape in part.shapes.values())
    return part.path, part.what, size


def _alike(rows: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, ...]]:
    """Yield one row of the table for those that differ in a number in their path alone."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for path, what, size in rows:
        together.setdefault((re.sub(r"\b\d+\b", "*", path), what, size), []).append(path)
    for (pattern, what, size), paths in together.items():
        name = paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)} times)"
        yield name, what, size, "", "", ""


def as_configs(what: MethodConfig | Sequence[MethodConfig]) -> tuple[MethodConfig, ...]:
    """The settings of one method or of several as a tuple.

    Raises:
        ConfigError: they cannot be combined.
    """
    configs = (what,) if isinstance(what, MethodConfig) else tuple(what)
    problems = combination_problems([config.method for config in configs])
    if len({config.dtype for config in configs}) > 1:
        each = ", ".join(f"{config.method} in {config.dtype}" for config in configs)
        problems.append(f"one adapter is trained in one precision, and dtype says {each}")
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
    copies = copies_of(model, configs, claims)
    _check_float(model, copies)
    matches = tuple(match for claim in claims for match in claim.matches)
    parts = parts_of(claims)
    # What changes the output of a copy as a whole comes after it; inside it would be lost.
    inside = [part.path for part in parts if part.path not in copies]
    _check_apart(copies, [*(match.site.path for match in matches), *inside])
    biases = dict.fromkeys(path for claim in claims for path in claim.biases)
    own = tuple(path for path in biases if not is_within(path, copies))
    tied = keeps_ties(configs)
    return completed(model, matches, own, copies, parts, tied=tied)


def parts_of(claims: Iterable[Claims]) -> tuple[Part, ...]:
    """The parts of all claims, without those whose weights an earlier one trains.

    Of a block's q_bias in DeBERTa, top-k and BitFit each want the same.
    """
    parts: dict[frozenset[str], Part] = {}
    for part in (part for claim in claims for part in claim.parts):
        parts.setdefault(frozenset(part.shapes), part)
    return tuple(parts.values())


def copies_of(
    model: nn.Module, configs: Sequence[MethodConfig], claims: Sequence[Claims]
) -> tuple[str, ...]:
    """The modules that are trained as full copies, none of which lies in another."""
    paths = [path for claim in claims for path in claim.copies]
    saved = [path for each in configs for path in _modules_to_save(model, each.modules_to_save)]
    return outermost(paths + saved)


def keeps_ties(configs: Iterable[MethodConfig]) -> bool:
    """Whether copies of tied weights are tied again, as full fine-tuning has them.

    LoRA's modules_to_save are copies apart, as they are in PEFT.
    """
    return any(isinstance(config, FullConfig) for config in configs)


def copied_parameters(
    model: nn.Module, copies: Iterable[str], *, tied: bool
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name of each tensor of full copies, and the base's parameter.

    Args:
        model: the base.
        copies: paths of modules.
        tied: a parameter that several of them have counts once, under its first name.
    """
    seen: set[int] = set()
    for path in copies:
        for name, parameter in base_parameters(model.get_submodule(path)):
            if not tied or id(parameter) not in seen:
                yield f"{path}.{name}", parameter
            seen.add(id(parameter))


def claims_beside_lora(model: nn.Module, configs: Iterable[MethodConfig]) -> list[Claims]:
    """Return what methods other than LoRA train of a model.

    Raises:
        TargetError: the model lacks what one of them needs.
    """
    others = (config for config in configs if not isinstance(config, LoRAConfig))
    return [CLAIMS[type(config)](model, config) for config in others]


def completed(
    model: nn.Module,
    found: tuple[Match, ...],
    biases: Sequence[str],
    copies: Sequence[str],
    parts: tuple[Part, ...],
    *,
    tied: bool = False,
) -> Plan:
    """A plan with the number of values in its biases and copies."""
    extra = sum(cast(Tensor, model.get_submodule(path).bias).numel() for path in biases)
    extra += sum(p.numel() for _, p in copied_parameters(model, copies, tied=tied))
    return Plan(found, tuple(biases), tuple(copies), extra, parts)


def with_moved_ranks(
    model: nn.Module,
    fitted: Plan,
    config: LoRAConfig,
    vectors: Mapping[str, SingularVectors],
) -> Plan:
    """A plan whose ranks are moved to where they explain most of the layers' inputs.

    Args:
        model: the base.
        fitted: as the settings alone say.
        config: of its low-rank updates.
        vectors: of the layers' inputs, by path.
    """
    moved = moved_ranks(fitted.sites, vectors, rho=config.eva_rho, use_rslora=config.use_rslora)
    matches = (
        replace(match_of(model.get_submodule(site.path), None, site, config), role=match.role)
        for match, site in zip(fitted.matches, moved, strict=True)
    )
    return replace(fitted, matches=tuple(matches))


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
    """Refuse updates inside of what is copied in full.

    Raises:
        TargetError: there are such.
    """
    clash = [copy for copy in copies if any(is_within(path, (copy,)) for path in adapted)]
    if clash:
        more = f" and {len(clash) - 1} more" if len(clash) > 1 else ""
        raise TargetError(
            f"{clash[0]}{more} would be copied in full and adapted too: leave these blocks out of "
            "the other method (lora.layers, lora.exclude, bottleneck.layers), or copy fewer"
        )


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


def short_names(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """The paths' last parts if they name exactly the adapted layers, else the paths."""
    chosen = {site.path for site in sites}
    leaves = {path.rpartition(".")[2] for path in chosen}
    named = {path for path, _ in base_modules(model) if path.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves if named == chosen else chosen))
