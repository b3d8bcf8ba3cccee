"""Whether a saved adapter fits one model, and every way in which it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.attachment.plan import (
    Plan,
    claims_beside_lora,
    completed,
    copied_parameters,
    copies_of,
    keeps_ties,
    parts_of,
)
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AdapterFileError, LorakitError, TargetError
from lorakit.methods.bitfit import adds_bias
from lorakit.methods.claims import match_of
from lorakit.methods.component import Part
from lorakit.methods.lora.lora import is_adaptable, is_linear, kind_of, matrix_shape, tensor_shapes
from lorakit.models.base import base_modules
from lorakit.models.identity import BaseIdentity
from lorakit.models.paths import is_within
from lorakit.models.quantized import quantized_within
from lorakit.models.roles import select_targets


@dataclass(frozen=True)
class Layout:
    """The modules of a base, and what words select there: looked up once for all adapters."""

    modules: Mapping[str, nn.Module]
    """Every module by its path."""
    _selected: dict[tuple[object, ...], frozenset[str]] = field(default_factory=dict)

    def names(self, config: LoRAConfig) -> frozenset[str]:
        """The names of the layers and slices that a configuration's targets select."""
        words = config.targets, config.layers, config.exclude
        if words not in self._selected:
            self._selected[words] = self._select(config)
        return self._selected[words]

    def _select(self, config: LoRAConfig) -> frozenset[str]:
        model = self.modules[""]
        try:
            kept = select_targets(
                model, config.targets, layers=config.layers, exclude=config.exclude
            )
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
    lora = adapter.lora or LoRAConfig()
    problems, expected = _misfits(modules, adapter, lora, other_heads)
    parts = _parts(modules[""], adapter, problems, expected)
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
    layers = [(modules[site.path], site) for site in adapter.sites]
    matched = tuple(match_of(layer, None, _as_on(layer, site), lora) for layer, site in layers)
    tied = keeps_ties(adapter.configs)
    return completed(modules[""], matched, biases, adapter.copied_modules, parts, tied=tied)


def _parts(
    model: nn.Module, adapter: Adapter, problems: list[str], expected: set[str]
) -> tuple[Part, ...]:
    """Return what methods other than LoRA have in a model; note their tensors and problems."""
    try:
        claims = claims_beside_lora(model, adapter.configs)
        copies = copies_of(model, adapter.configs, claims)
    except LorakitError as error:
        problems.append(str(error))
        return ()
    if keeps_ties(adapter.configs):
        problems += _other_copies(adapter, copies)
    biases = (path for claim in claims for path in claim.biases if not is_within(path, copies))
    expected.update(f"{path}.bias" for path in biases)
    parts = parts_of(claims)
    for part in parts:
        expected.update(part.shapes)
        for name, shape in part.shapes.items():
            problems += _shape_problem(name, adapter.tensors.get(name), shape)
    return parts


def _other_copies(adapter: Adapter, copies: Sequence[str]) -> list[str]:
    """Return how an adapter's full copies differ from those that its settings ask for."""
    method, found = adapter.method, adapter.copied_modules
    return [
        *(
            f"{p}  {method} trains it here, the adapter has no copy"
            for p in copies
            if p not in found
        ),
        *(
            f"{p}  the adapter has a copy, {method} trains none here"
            for p in found
            if p not in copies
        ),
    ]


def _as_on(layer: nn.Module, site: Site) -> Site:
    """A site with the facts about its layer that the layer itself shows."""
    rows = None if site.rows is None else matrix_shape(layer)[0]
    kind = kind_of(layer)
    if (site.kind, site.layer_rows) == (kind, rows):
        return site
    return replace(site, kind=kind, layer_rows=rows)


def _is_bias(name: str, adapter: Adapter) -> bool:
    own = any(name.startswith(f"{path}.") for path in adapter.copied_modules)
    return name.endswith(".bias") and ".bottleneck." not in name and not own


def _misfits(
    modules: Mapping[str, nn.Module],
    adapter: Adapter,
    lora: LoRAConfig,
    other_heads: Sequence[str],
) -> tuple[list[str], set[str]]:
    """The problems of an adapter's own tensors, and the names it should have."""
    ends = ("lora_a", "lora_b", "lora_magnitude") if lora.use_dora else ("lora_a", "lora_b")
    expected = {f"{site.name}.{end}" for site in adapter.sites for end in ends}
    problems = [
        each for site in adapter.sites for each in _site_misfits(modules, site, adapter, lora)
    ]
    for found, names in (
        _copy_misfits(modules, adapter, other_heads),
        _bias_misfits(modules, adapter),
    ):
        problems += found
        expected |= names
    return problems, expected


def _site_misfits(
    modules: Mapping[str, nn.Module], site: Site, adapter: Adapter, lora: LoRAConfig
) -> Iterator[str]:
    """Yield how one low-rank update does not fit its layer."""
    layer = modules.get(site.path)
    if layer is None:
        yield f"{site.path}  is not a module of this model"
    elif not is_adaptable(layer):
        yield f"{site.path}  is a {type(layer).__name__}, which LoRA can't adapt"
    elif site.rows is not None and site.rows[-1][1] > matrix_shape(layer)[0]:
        yield f"{site.name}  has rows beyond the layer's {matrix_shape(layer)[0]}"
    elif lora.use_dora and not is_linear(layer):
        yield f"{site.path}  is a {type(layer).__name__}, which DoRA can't adapt"
    else:
        for name, shape in tensor_shapes(layer, site, lora).items():
            yield from _shape_problem(name, adapter.tensors.get(name), shape)


def _copy_misfits(
    modules: Mapping[str, nn.Module], adapter: Adapter, other_heads: Sequence[str]
) -> tuple[list[str], set[str]]:
    """Return how full copies do not fit, and the names of their tensors."""
    absent = [path for path in adapter.copied_modules if path not in modules]
    present = [path for path in adapter.copied_modules if path in modules]
    held = [path for path in present if quantized_within(modules[path]) is not None]
    problems = [f"{path}  is not a module of this model" for path in absent]
    problems += [f"{path}  is replaced in full, which a quantised base can't be" for path in held]
    expected = {name for name in adapter.tensors for p in held if name.startswith(f"{p}.")}
    present = [path for path in present if path not in held]
    heads = [_classes(modules[path], path, adapter) for path in present if path in other_heads]
    classes = {name: count for head in heads for name, count in head.items()}
    tied = keeps_ties(adapter.configs)
    for name, parameter in copied_parameters(modules[""], present, tied=tied):
        expected.add(name)
        shape = tuple(parameter.shape)
        shape = (classes[name], *shape[1:]) if name in classes else shape
        problems += _shape_problem(name, adapter.tensors.get(name), shape)
    return problems, expected


def _bias_misfits(modules: Mapping[str, nn.Module], adapter: Adapter) -> tuple[list[str], set[str]]:
    """Return how trained biases do not fit, and the names of those that have a place."""
    problems: list[str] = []
    expected: set[str] = set()
    for name in adapter.tensors:
        layer = modules.get(name.removesuffix(".bias")) if _is_bias(name, adapter) else None
        bias = getattr(layer, "bias", None)
        if layer is not None and isinstance(bias, nn.Parameter) and adds_bias(layer):
            expected.add(name)
            problems += _shape_problem(name, adapter.tensors[name], tuple(bias.shape))
    return problems, expected


def _classes(head: nn.Module, path: str, adapter: Adapter) -> dict[str, int]:
    """The number of classes that each parameter of a head's last layer has in an adapter."""
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
    """The layers that the adapter's targets name in this model and its sites leave out."""
    if adapter.lora is None or not adapter.lora.targets:
        return []
    missing = sorted(layout.names(adapter.lora) - {site.name for site in adapter.sites})
    return [f"{name}  is among the targets, but the adapter has nothing for it" for name in missing]
