"""Whether a saved adapter fits one model: its plan, and every way in which it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.loralib import UNPROVEN_BIASES
from lorakit.adapter.site import Site
from lorakit.adapter.tied_sites import are_equal
from lorakit.attachment.base_modules import BaseModules
from lorakit.attachment.block_order import other_blocks
from lorakit.attachment.changed_weights import other_weights
from lorakit.attachment.copies import with_ties
from lorakit.attachment.plan import Plan, in_order, wanted, without_effect
from lorakit.config.methods import FullConfig, LoRAConfig
from lorakit.errors import AdapterFileError, LorakitError
from lorakit.methods.bitfit import TrainedBias, adds_bias, trained_bias
from lorakit.methods.component import Component, Shape
from lorakit.methods.lora.lora import (
    ENDS,
    kind_of,
    kind_of_experts,
    matrices_of,
    matrix_shape,
    takes_bias,
    takes_magnitudes,
    why_not_adaptable,
)
from lorakit.methods.lora.low_rank import LowRankComponent, low_rank_component
from lorakit.methods.module_copy import TrainedCopy, trained_copy
from lorakit.methods.token_rows import clashes
from lorakit.models.base import base_modules, base_parameters
from lorakit.models.experts import expert_matrices
from lorakit.models.identity import BaseIdentity
from lorakit.models.linear_probe import own_class
from lorakit.models.load import task_of
from lorakit.models.multihead import is_multihead
from lorakit.models.paths import is_within
from lorakit.models.quantized import quantized_within
from lorakit.models.tasks import form_of
from lorakit.upstream.private_names import own_parameters


def saved_plan(
    base: BaseModules,
    adapter: Adapter,
    identity: BaseIdentity | None,
    *,
    allow_other_base: bool = False,
    other_heads: Sequence[str] = (),
) -> Plan:
    """The plan of a saved adapter on a model.

    Args:
        base: its modules.
        adapter: what is to fit.
        identity: of the base.
        allow_other_base: accept an adapter whose base has other weights.
        other_heads: full copies that may have another number of classes than the base's.

    Raises:
        AdapterFileError: every way in which it does not fit, or the one that explains them all:
            it is for another task.
    """
    found = _Found(base, adapter)
    plan = in_order(found.components(other_heads), adapter.configs)
    twins, told = _second_names(base, adapter, plan.shapes)
    problems = [*other_blocks(base.model, adapter.configs), *found.problems, *told]
    problems += _differences(plan.shapes, adapter, found.refused, twins)
    problems += clashes(plan.components)
    problems += [*without_effect(base.model, plan.components), *_missed_by_targets(base, adapter)]
    if not allow_other_base:
        problems += other_weights(base.model, adapter)
    if not allow_other_base and adapter.base is not None and identity is not None:
        other = adapter.base.difference(identity)
        if other:
            problems.append(
                f"it was trained on another base ({adapter.base.name or 'unnamed'}): {other}; "
                "allow_other_base=True accepts that"
            )
    if problems:
        raise _misfit(base.model, adapter, problems)
    return plan


def _misfit(model: nn.Module, adapter: Adapter, problems: Sequence[str]) -> AdapterFileError:
    """What is said of an adapter with problems: where its task is another, that alone."""
    task = adapter.card.get("task") or adapter.card.get("task_type")
    if isinstance(model, PreTrainedModel) and isinstance(task, str):
        own, form = task_of(model), form_of(task, model.config)
        if form not in (None, form_of(own, model.config)):
            return AdapterFileError(
                f"the adapter does {task}, and this model was loaded for {own}: load the adapter's"
                " base for its own task"
            )
    return AdapterFileError.listing("the adapter does not fit this model", problems)


class _Found:
    """The components of a saved adapter that a model has a place for, and what has none."""

    def __init__(self, base: BaseModules, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter
        self.problems: list[str] = []
        self.refused: set[str] = set()
        """The names of tensors whose module cannot have them, as a problem says already."""

    def components(self, other_heads: Sequence[str]) -> list[Component]:
        """Every component: those of files' sites and copies, and what follows from the settings."""
        low_rank = list(self._low_rank())
        copies = list(self._copies(other_heads))
        others, told = self._wanted()
        of_copy = {each.path: each.method for each in others if isinstance(each, TrainedCopy)}
        kept = [replace(each, method=of_copy.get(each.path, each.method)) for each in copies]
        self.problems += told
        if told:
            self.refused |= {name for name in self._adapter.tensors if name.endswith(".token_rows")}
        if any(isinstance(config, FullConfig) for config in self._adapter.configs):
            # Where the settings do not fit the model, no copy is as they ask.
            self.problems += () if told else _other_copies(self._adapter, of_copy)
        kept = list(with_ties(self._base.model, kept, self._adapter.configs))
        self.problems += self._untied(kept)
        beside = [each for each in others if not isinstance(each, TrainedCopy)]
        found = [*low_rank, *kept, *beside]
        return [*found, *self._biases({name for each in found for name in each.shapes})]

    def _low_rank(self) -> Iterator[LowRankComponent]:
        config = self._adapter.lora or LoRAConfig()
        for site in self._adapter.sites:
            layer = self._base.by_path.get(site.module_path)
            problem = _site_problem(layer, site, config)
            if problem is not None:
                self.problems.append(problem)
                self.refused |= {f"{site.name}.{end}" for end in ENDS}
            elif layer is not None:
                yield low_rank_component(layer, _on_layer(site, layer), config)

    def _untied(self, copies: Sequence[TrainedCopy]) -> Iterator[str]:
        """Yield a line for each site and copy that differs from what it is tied to."""
        tensors = self._adapter.tensors
        sites = {site.path: site for site in self._adapter.sites}
        for site in self._adapter.sites:
            owner = sites.get(site.tied_to or "")
            if owner is not None and not are_equal(site, owner, tensors):
                yield f"{site.path}  is tied to {owner.path}, and has another A or B"
        first: dict[int, str] = {}
        for each in copies:
            own = dict(base_parameters(self._base.by_path[each.path]))
            for inner in each.sizes:
                name = f"{each.path}.{inner}"
                other = first.setdefault(id(own[inner]), name)
                both = name in tensors and other in tensors
                if inner in each.again and both and not torch.equal(tensors[name], tensors[other]):
                    yield f"{name}  is tied to {other}, and has other values"

    def _copies(self, other_heads: Sequence[str]) -> Iterator[TrainedCopy]:
        configs, tensors = self._adapter.configs, self._adapter.tensors
        for path in self._adapter.copied_modules:
            module = self._base.by_path.get(path)
            if module is None:
                self.problems.append(f"{path}  is not a module of this model")
            elif quantized_within(module) is not None:
                self.problems.append(
                    f"{path}  is replaced in full, which a quantised base can't be"
                )
                self.refused |= {name for name in tensors if name.startswith(f"{path}.")}
            else:
                first = configs[0]
                made = trained_copy(self._base.model, path, first.method, dtype=first.dtype)
                yield _with_classes(made, module, tensors) if path in other_heads else made

    def _wanted(self) -> tuple[tuple[Component, ...], list[str]]:
        """What the settings ask for, but for low-rank updates; or why the model lacks it."""
        try:
            return wanted(self._base.model, self._adapter.configs, beside_lora=True), []
        except LorakitError as error:
            return (), [str(error)]

    def _biases(self, known: set[str]) -> Iterator[TrainedBias]:
        """The trained biases: those that the tensors tell of, and those of LoRA's settings."""
        for name in dict.fromkeys([*self._adapter.tensors, *self._wanted_biases()]):
            path, _, leaf = name.rpartition(".")
            layer = self._base.by_path.get(path)
            if leaf != "bias" or name in known or name in self.refused or layer is None:
                continue
            if isinstance(own_parameters(layer).get("bias"), nn.Parameter) and adds_bias(layer):
                config = self._adapter.lora or self._adapter.configs[0]
                yield trained_bias(layer, path, config)

    def _wanted_biases(self) -> Iterator[str]:
        """The names of the biases that LoRA trains; loralib's files may have any of them."""
        config = self._adapter.lora
        if config is None or config.bias == "none" or UNPROVEN_BIASES in self._adapter.unverified:
            return
        adapted = {site.path for site in self._adapter.sites}
        for path, layer in self._base.by_path.items():
            chosen = config.bias == "all" or path in adapted
            has_bias = own_parameters(layer).get("bias") is not None and adds_bias(layer)
            if chosen and has_bias and not is_within(path, self._adapter.copied_modules):
                yield f"{path}.bias"


def _site_problem(layer: nn.Module | None, site: Site, config: LoRAConfig) -> str | None:
    """How one low-rank update does not fit its layer, if it does not."""
    if layer is None:
        return f"{site.path}  is not a module of this model"
    if site.is_of_experts:
        return _experts_problem(layer, site, config)
    if site.is_of_parameter:
        return None if is_multihead(layer) else f"{site.path}  is no parameter of this model"
    reason = why_not_adaptable(layer)
    if reason is not None:
        return f"{site.path}  is a {own_class(layer).__name__}, which LoRA can't adapt: {reason}"
    if site.rows is not None and site.rows[-1][1] > matrix_shape(layer)[0]:
        return f"{site.name}  has rows beyond the layer's {matrix_shape(layer)[0]}"
    if config.use_dora and not takes_magnitudes(layer):
        return f"{site.path}  is a {type(layer).__name__}, which DoRA can't adapt"
    if config.lora_bias and not takes_bias(layer):
        return f"{site.path}  is a {own_class(layer).__name__}, to which no bias of B can be added"
    return None


def _experts_problem(module: nn.Module, site: Site, config: LoRAConfig) -> str | None:
    """How an update of experts does not fit a module, if it does not."""
    found = next((each for each in expert_matrices(module) if each.name == site.parameter), None)
    if found is None:
        name = own_class(module).__name__
        return f"{site.path}  is no parameter with a matrix for each expert in this {name}"
    if site.rows is not None and site.rows[-1][1] > found.d_out:
        return f"{site.name}  has rows beyond the {found.d_out} of each matrix"
    if config.use_dora or config.lora_bias:
        form = "DoRA" if config.use_dora else "lora_bias"
        return f"{site.path}  is of experts, which {form} can't adapt"
    return None


def _on_layer(site: Site, layer: nn.Module) -> Site:
    """A site with the facts about its layer that the layer itself shows."""
    if site.is_of_experts:
        matrices = matrices_of(layer, site)
        kind, d_out = kind_of_experts(matrices), matrices.d_out
    elif site.is_of_parameter:
        return site
    else:
        kind, d_out = kind_of(layer), matrix_shape(layer)[0]
    rows = None if site.rows is None else d_out
    if (site.kind, site.layer_rows) == (kind, rows):
        return site
    return replace(site, kind=kind, layer_rows=rows)


def _other_copies(adapter: Adapter, copies: Iterable[str]) -> Iterator[str]:
    """How an adapter's full copies differ from those that its settings ask for."""
    method, wanted_here, found = adapter.method, list(copies), adapter.copied_modules
    for path in wanted_here:
        if path not in found:
            yield f"{path}  {method} trains it here, the adapter has no copy"
    for path in found:
        if path not in wanted_here:
            yield f"{path}  the adapter has a copy, {method} trains none here"


def _with_classes(copy: TrainedCopy, head: nn.Module, tensors: Mapping[str, object]) -> TrainedCopy:
    """A copy of a head whose last layer has the number of classes that an adapter has."""
    linear = [name for name, module in base_modules(head) if isinstance(module, nn.Linear)]
    last = linear[-1] if linear else None
    weight = tensors.get(".".join(filter(None, (copy.path, last, "weight"))))
    shape: Shape = tuple(getattr(weight, "shape", ()))
    if last is None or len(shape) != 2:
        return copy
    names = {".".join(filter(None, (last, leaf))) for leaf in ("weight", "bias")}
    sizes = {
        name: (shape[0], *size[1:]) if name in names else size for name, size in copy.sizes.items()
    }
    return replace(copy, sizes=sizes)


def _second_names(
    base: BaseModules, adapter: Adapter, expected: Mapping[str, Shape]
) -> tuple[set[str], list[str]]:
    """The adapter's tensors of parameters that the base has under an expected name, too.

    PEFT's bias="all" writes the bias of BERT's head for words under both of its names.

    Returns:
        Their names, and a line for each that has other values than the first.
    """

    def parameter(name: str) -> nn.Parameter | None:
        owner, _, leaf = name.rpartition(".")
        module = base.by_path.get(owner)
        return None if module is None else own_parameters(module).get(leaf)

    first = {id(found): name for name in expected if (found := parameter(name)) is not None}
    twins = {
        name: first[id(found)]
        for name in adapter.tensors.keys() - expected.keys()
        if (found := parameter(name)) is not None and id(found) in first
    }
    problems = [
        f"{name}  has other values than {other}, which is the same parameter in this model"
        for name, other in sorted(twins.items())
        if other in adapter.tensors
        and not torch.equal(adapter.tensors[name], adapter.tensors[other])
    ]
    return set(twins), problems


def _differences(
    expected: Mapping[str, Shape], adapter: Adapter, refused: set[str], twins: set[str]
) -> Iterator[str]:
    """How an adapter's tensors differ from those of its plan."""
    tensors = adapter.tensors
    of_experts = {f"{site.name}.lora_a" for site in adapter.sites if site.is_of_experts}

    def counted(name: str, count: int) -> str:
        return f"on {count} experts" if name in of_experts else f"with rank {count}"

    for name, shape in expected.items():
        found = tuple(tensors[name].shape) if name in tensors else shape
        if found != shape:
            is_other_count = name.endswith(".lora_a") and found[1:] == shape[1:]
            hint = f": was it trained {counted(name, found[0])}?" if is_other_count else ""
            yield f"{name}  shape {found} in the adapter, {shape} expected{hint}"
    for name in sorted(expected.keys() - tensors.keys()):
        yield f"{name}  missing from the adapter"
    for name in sorted(tensors.keys() - expected.keys() - refused - twins):
        yield f"{name}  in the adapter, but it has no place in this model"


def _missed_by_targets(base: BaseModules, adapter: Adapter) -> list[str]:
    """The layers that the adapter's targets name in this model and its sites leave out.

    What is copied in full is adapted by neither PEFT nor lorakit, whatever the targets name.
    """
    if adapter.lora is None or not adapter.lora.targets:
        return []
    left = base.selected(adapter.lora) - {site.name for site in adapter.sites}
    missing = sorted(name for name in left if not is_within(name, adapter.copied_modules))
    return [f"{name}  is among the targets, but the adapter has nothing for it" for name in missing]
