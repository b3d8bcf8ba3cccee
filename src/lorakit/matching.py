"""What a configuration or a saved adapter means for one model: match table and misfits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from torch import Tensor, nn

from lorakit.adapter import Adapter, Site, scale_of
from lorakit.config import LoRAConfig
from lorakit.errors import AdapterFileError, TargetError, did_you_mean
from lorakit.methods.lora import (
    ConvNd,
    is_adaptable,
    kind_of,
    matrix_shape,
    parameter_shapes,
)
from lorakit.models.base import base_modules, base_parameters
from lorakit.models.identity import BaseIdentity
from lorakit.models.roles import Place, named, select, task_heads

BIASED = (nn.Linear, nn.LayerNorm, *ConvNd)
V = TypeVar("V")


@dataclass(frozen=True)
class Match:
    """One row of the match table: a site, and the layer it found."""

    site: Site
    role: str | None
    """What the layer is called in its family, where that is known."""
    shape: tuple[int, int]
    """(d_out, d_in) of the adapted matrix."""
    parameters: int
    """Trained values in A and B."""


@dataclass(frozen=True)
class Plan:
    """What a configuration means for one model, before anything is changed."""

    matches: tuple[Match, ...]
    biases: tuple[str, ...] = ()
    """Modules whose bias is trained."""
    copies: tuple[str, ...] = ()
    """Modules trained as full copies."""
    extra_parameters: int = 0
    """Trained values in biases and copies."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Return every low-rank update."""
        return tuple(match.site for match in self.matches)

    @property
    def parameters(self) -> int:
        """Return the number of values that are trained."""
        return sum(match.parameters for match in self.matches) + self.extra_parameters

    def __str__(self) -> str:
        """Return the match table as text."""
        head = ("module", "role", "shape", "rank", "scale", "parameters")
        rows = [head, *(_table_row(match) for match in self.matches)]
        rows += [(path, "bias", "", "", "", "") for path in self.biases]
        rows += [(path, "full copy", "", "", "", "") for path in self.copies]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.parameters:,} parameters are trained"])


def _table_row(match: Match) -> tuple[str, ...]:
    site, shape = match.site, match.shape
    size = f"{shape[0]}x{shape[1]}"
    role, rank = match.role or "", str(site.rank)
    return site.name, role, size, rank, f"{site.scale:g}", f"{match.parameters:,}"


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Return what `attach(model, config)` would adapt; nothing is changed.

    Raises:
        TargetError: a name in the configuration matches nothing, or a layer twice.
    """
    kept = select(model, config.targets, layers=config.layers, exclude=config.exclude)
    _check_adaptable(model, kept)
    ranks = _by_place(model, kept, config.rank_pattern, "rank_pattern")
    alphas = _by_place(model, kept, config.alpha_pattern, "alpha_pattern")
    sites = [(place, _site(model, place, config, ranks, alphas)) for place in kept]
    found = tuple(_match(model.get_submodule(place.path), place, site) for place, site in sites)
    biases = _bias_paths(model, config, {place.path for place in kept})
    return _complete(model, found, biases, _copy_paths(model, config, kept))


def _complete(
    model: nn.Module,
    found: tuple[Match, ...],
    biases: Sequence[str],
    copies: Sequence[str],
) -> Plan:
    extra = sum(cast(Tensor, model.get_submodule(path).bias).numel() for path in biases)
    extra += sum(p.numel() for c in copies for _, p in base_parameters(model.get_submodule(c)))
    return Plan(found, tuple(biases), tuple(copies), extra)


def _check_adaptable(model: nn.Module, kept: Sequence[Place]) -> None:
    problems = [
        f"{place.path} is a {type(model.get_submodule(place.path)).__name__}"
        for place in kept
        if not is_adaptable(model.get_submodule(place.path))
    ]
    if problems:
        raise TargetError.listing("LoRA has no update for some targets; exclude them", problems)


def _by_place(
    model: nn.Module, kept: Sequence[Place], pattern: Mapping[str, V], setting: str
) -> dict[Place, V]:
    """Return the value that a pattern gives to each place; the last word that names it counts.

    Raises:
        TargetError: a word names none of the adapted places.
    """
    found = named(model, pattern, what=setting)
    idle = [
        f"{word!r} names none of the adapted layers"
        for word, its_places in found.items()
        if not set(its_places) & set(kept)
    ]
    if idle:
        raise TargetError.listing(f"{setting} says something of layers that are not adapted", idle)
    return {place: pattern[word] for word, its_places in found.items() for place in its_places}


def _site(
    model: nn.Module,
    place: Place,
    config: LoRAConfig,
    ranks: Mapping[Place, int],
    alphas: Mapping[Place, float],
) -> Site:
    rank = ranks.get(place, config.rank)
    alpha = alphas.get(place, config.alpha)
    numerator = float(rank if alpha is None else alpha)
    layer = model.get_submodule(place.path)
    return Site(
        path=place.path,
        role=place.role if place.rows is not None else None,
        rows=place.rows,
        rank=rank,
        alpha=numerator,
        scale=scale_of(rank, numerator, use_rslora=config.use_rslora),
        groups=getattr(layer, "groups", 1),
        kind=kind_of(layer),
        layer_rows=None if place.rows is None else matrix_shape(layer)[0],
    )


def _match(layer: nn.Module, place: Place | None, site: Site) -> Match:
    a, b = parameter_shapes(layer, site)
    role, shape = place.role if place else site.role, (b[0], math.prod(a[1:]))
    return Match(site, role, shape, math.prod(a) + math.prod(b))


def _bias_paths(model: nn.Module, config: LoRAConfig, adapted: set[str]) -> list[str]:
    if config.bias == "none":
        return []
    named = {
        path: module
        for path, module in base_modules(model)
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and (config.bias == "all" or path in adapted)
    }
    odd = [f"{path} ({type(m).__name__})" for path, m in named.items() if not _adds_bias(m)]
    if odd:
        raise TargetError.listing(f"bias={config.bias!r} meets biases it can't train", odd)
    if not named:
        raise TargetError(
            f"bias={config.bias!r} asks for biases, but none of the layers has one: use bias='none'"
        )
    return list(named)


def _adds_bias(module: nn.Module) -> bool:
    """Tell whether a module's output is its product plus its bias."""
    return isinstance(module, BIASED) or type(module).__name__ in ("Conv1D", "AdaptedConv1D")


def _copy_paths(model: nn.Module, config: LoRAConfig, kept: Sequence[Place]) -> list[str]:
    names = [path for path, _ in base_modules(model)]
    paths: list[str] = []
    for word in config.modules_to_save:
        if word == "auto":
            paths += task_heads(model)
            continue
        found = [path for path in names if path == word or path.endswith(f".{word}")]
        if not found:
            leaves = sorted({path.rpartition(".")[2] for path in names if path})
            hint = did_you_mean(word, leaves)
            raise TargetError(f"modules_to_save: no module is called {word!r}{hint}")
        paths += [path for path in found if path not in paths]
    clash = [p for p in paths for k in kept if k.path == p or k.path.startswith(f"{p}.")]
    if clash:
        raise TargetError(f"{clash[0]} would be copied in full and adapted too: leave one out")
    return paths


@dataclass(frozen=True)
class Layout:
    """The modules of a base, and what words select there: looked up once for all adapters."""

    modules: Mapping[str, nn.Module]
    """Every module by its path."""
    _selected: dict[tuple[object, ...], frozenset[str]] = field(default_factory=dict)

    def names(self, config: LoRAConfig) -> frozenset[str]:
        """Return the names of the layers and slices that a configuration's targets select."""
        words = config.targets, config.layers, config.exclude
        if words not in self._selected:
            self._selected[words] = self._select(config)
        return self._selected[words]

    def _select(self, config: LoRAConfig) -> frozenset[str]:
        model = self.modules[""]
        try:
            kept = select(model, config.targets, layers=config.layers, exclude=config.exclude)
        except TargetError:
            # The words may be those of another tool, or of a family unknown here.
            return frozenset()
        return frozenset(place.name for place in kept)


def fit(
    layout: Layout,
    adapter: Adapter,
    identity: BaseIdentity | None,
    *,
    allow_other_base: bool = False,
    other_heads: Sequence[str] = (),
) -> Plan:
    """Return how a saved adapter lies on a model.

    Args:
        layout: of the base.
        adapter: what to fit.
        identity: of the base.
        allow_other_base: accept an adapter whose base has other weights.
        other_heads: full copies that may have another number of classes than the base's.

    Raises:
        AdapterFileError: every way in which it does not fit.
    """
    modules = layout.modules
    problems, expected = _misfits(modules, adapter, other_heads)
    problems += [
        f"{name}  missing from the adapter" for name in sorted(expected - set(adapter.tensors))
    ]
    problems += [
        f"{name}  in the adapter, but it has no place in this model"
        for name in sorted(set(adapter.tensors) - expected)
    ]
    problems += _missed_by_targets(layout, adapter)
    if not allow_other_base and adapter.base is not None and identity is not None:
        other = adapter.base.difference(identity)
        if other:
            problems.append(
                f"it was trained on another base ({adapter.base.name or 'unnamed'}): {other}; "
                "allow_other_base=True accepts that"
            )
    if problems:
        raise AdapterFileError.listing("the adapter does not fit this model", problems)
    biases = [n.removesuffix(".bias") for n in adapter.tensors if _is_bias(n, adapter)]
    matched = tuple(
        _match(modules[site.path], None, _as_on(modules[site.path], site)) for site in adapter.sites
    )
    return _complete(modules[""], matched, biases, adapter.copied_modules)


def _as_on(layer: nn.Module, site: Site) -> Site:
    """Return a site with the facts about its layer that the layer itself shows."""
    rows = None if site.rows is None else matrix_shape(layer)[0]
    kind = kind_of(layer)
    if (site.kind, site.layer_rows) == (kind, rows):
        return site
    return replace(site, kind=kind, layer_rows=rows)


def _is_bias(name: str, adapter: Adapter) -> bool:
    return name.endswith(".bias") and not any(
        name.startswith(f"{path}.") for path in adapter.copied_modules
    )


def _misfits(
    modules: Mapping[str, nn.Module], adapter: Adapter, other_heads: Sequence[str]
) -> tuple[list[str], set[str]]:
    """Return the problems of an adapter's own tensors, and the names it should have."""
    problems: list[str] = []
    expected: set[str] = set()
    for site in adapter.sites:
        layer = modules.get(site.path)
        names = (f"{site.name}.lora_a", f"{site.name}.lora_b")
        expected.update(names)
        if layer is None:
            problems.append(f"{site.path}  is not a module of this model")
        elif not is_adaptable(layer):
            problems.append(f"{site.path}  is a {type(layer).__name__}, which LoRA can't adapt")
        elif site.rows is not None and site.rows[-1][1] > matrix_shape(layer)[0]:
            problems.append(f"{site.name}  has rows beyond the layer's {matrix_shape(layer)[0]}")
        else:
            for name, shape in zip(names, parameter_shapes(layer, site), strict=True):
                problems += _shape_problem(name, adapter.tensors.get(name), shape)
    for path in adapter.copied_modules:
        if path not in modules:
            problems.append(f"{path}  is not a module of this model")
            continue
        classes = _classes(modules[path], path, adapter) if path in other_heads else {}
        for name, parameter in base_parameters(modules[path]):
            name = f"{path}.{name}"
            expected.add(name)
            shape = (classes.get(name, parameter.shape[0]), *parameter.shape[1:])
            problems += _shape_problem(name, adapter.tensors.get(name), shape)
    for name in adapter.tensors:
        if name not in expected and _is_bias(name, adapter):
            layer = modules.get(name.removesuffix(".bias"))
            bias = getattr(layer, "bias", None)
            if layer is not None and isinstance(bias, nn.Parameter) and _adds_bias(layer):
                expected.add(name)
                problems += _shape_problem(name, adapter.tensors[name], tuple(bias.shape))
    return problems, expected


def _classes(head: nn.Module, path: str, adapter: Adapter) -> dict[str, int]:
    """Return the number of classes that each parameter of a head's last layer has in an adapter."""
    linear = [n for n, module in base_modules(head) if isinstance(module, nn.Linear)]
    if not linear:
        return {}
    last = ".".join(filter(None, (path, linear[-1])))
    weight = adapter.tensors.get(f"{last}.weight")
    if weight is None or weight.dim() != 2:
        return {}
    return {f"{last}.weight": weight.shape[0], f"{last}.bias": weight.shape[0]}


def _shape_problem(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> list[str]:
    if tensor is None or tuple(tensor.shape) == expected:
        return []
    hint = ""
    if name.endswith(".lora_a") and tuple(tensor.shape[1:]) == expected[1:]:
        hint = f": was it trained with rank {tensor.shape[0]}?"
    return [f"{name}  shape {tuple(tensor.shape)} in the adapter, {expected} expected{hint}"]


def _missed_by_targets(layout: Layout, adapter: Adapter) -> list[str]:
    """Return the layers that the adapter's targets name in this model and its sites leave out."""
    if not adapter.config.targets:
        return []
    missing = sorted(layout.names(adapter.config) - {site.name for site in adapter.sites})
    return [f"{name}  is among the targets, but the adapter has nothing for it" for name in missing]


def short_names(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """Return the paths' last parts if they name exactly the adapted layers, else the paths."""
    chosen = {site.path for site in sites}
    leaves = {path.rpartition(".")[2] for path in chosen}
    named = {path for path, _ in base_modules(model) if path.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves if named == chosen else chosen))
