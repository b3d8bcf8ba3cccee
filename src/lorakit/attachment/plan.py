"""A plan: the components of one adapter on one model, fresh or saved, before anything changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.attachment.block_order import on_blocks_of
from lorakit.attachment.changed_weights import check_weights_as_they_were
from lorakit.attachment.copies import modules_to_save, with_ties
from lorakit.attachment.match_table import left_out_lines, match_table
from lorakit.config.methods import (
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    LoRAConfig,
    MethodConfig,
    PrefixConfig,
    combination_problems,
)
from lorakit.errors import AttachError, ConfigError, TargetError
from lorakit.layers.chain import Chain
from lorakit.layers.operation import Update
from lorakit.methods import bitfit, bottleneck, full, token_rows
from lorakit.methods.bitfit import TrainedBias
from lorakit.methods.component import Component, Materials, Shape
from lorakit.methods.lora import targets
from lorakit.methods.lora.eva import SingularVectors, moved_ranks
from lorakit.methods.lora.experts import ExpertsUpdate
from lorakit.methods.lora.low_rank import LowRankComponent, low_rank_component
from lorakit.methods.lora.tied import any_ties
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.methods.module_copy import TrainedCopy
from lorakit.methods.prompt import prefix
from lorakit.methods.token_rows import TokenRows, clashes, with_paths
from lorakit.models.base import base_modules, is_offloaded
from lorakit.models.families import uncalled_weights
from lorakit.models.identity import BaseIdentity
from lorakit.models.paths import is_within, outermost
from lorakit.models.quantized import card_of_base, quantized_within
from lorakit.models.roles import never_called
from lorakit.models.routers import routers
from lorakit.models.target_words import ALL_LINEAR

COMPONENTS: Mapping[type[MethodConfig], Callable[[nn.Module, Any], tuple[Component, ...]]] = {
    LoRAConfig: targets.components,
    FullConfig: full.components,
    BitFitConfig: bitfit.components,
    PrefixConfig: prefix.components,
    BottleneckConfig: bottleneck.components,
}
"""What finds out what a method trains of a model, by the class of its settings."""

FIRST = ("full", "top-k", "bitfit")
"""The methods that a value of the base belongs to, whatever other method trains it too."""

C = TypeVar("C", bound=Component)


@dataclass(frozen=True)
class Plan:
    """What an adapter is on one model: every component, before anything is changed.

    Examples:
        >>> plan = lk.plan(model, lk.LoRAConfig(rank=8, targets="q"))
        >>> len(plan.sites), plan.parameters
        (30, 276480)
        >>> plan.shapes["model.layers.0.self_attn.q_proj.lora_b"]
        (576, 8)
    """

    components: tuple[Component, ...]
    """In the order in which their updates are made."""
    configs: tuple[MethodConfig, ...]
    """The settings of the adapter's methods."""
    routers: tuple[str, ...] = ()
    """The paths of the routers that `all-linear` leaves out of a fresh adapter."""

    def of_kind(self, kind: type[C]) -> tuple[C, ...]:
        """The components of one class."""
        return tuple(each for each in self.components if isinstance(each, kind))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every low-rank update."""
        return tuple(each.site for each in self.of_kind(LowRankComponent))

    @property
    def copies(self) -> tuple[str, ...]:
        """The paths of the modules that are trained as full copies."""
        return tuple(each.path for each in self.of_kind(TrainedCopy))

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each tensor of the adapter, by its name."""
        return {name: shape for each in self.components for name, shape in each.shapes.items()}

    @cached_property
    def methods(self) -> Mapping[str, str]:
        """The method that trains each tensor of the adapter, by the tensor's name."""
        return {name: each.method for each in self.components for name in each.shapes}

    @property
    def parameters(self) -> int:
        """The number of values that are trained."""
        return sum(each.parameters for each in self.components)

    def updates(self, materials: Materials) -> dict[str, Update]:
        """The update of each changed module, by its path; the modules are not changed.

        Raises:
            AttachError: weights of the base are needed that accelerate has offloaded.
        """
        _check_offloaded(self, materials)
        updates: dict[str, Update] = {}
        for each in self.components:
            first, own = updates.get(each.path), each.update(materials)
            if first is None:
                updates[each.path] = own
            elif not _joined(first, own):
                updates[each.path] = Chain([first, own])
        return updates

    def adapter(self, model: nn.Module, identity: BaseIdentity | None) -> Adapter:
        """The fresh adapter without its tensors, which are in the model's layers."""
        return Adapter(
            configs=tuple(
                with_paths(config, self.of_kind(TokenRows))
                if isinstance(config, LoRAConfig)
                else config
                for config in self.configs
            ),
            sites=self.sites,
            tensors={},
            copied_modules=self.copies,
            target_modules=_short_names(model, self.sites),
            base=identity,
            card=card_of_base(model),
        )

    def table(self, *, full: bool = False) -> str:
        """The match table as text: one line for layers that are alike, or with `full` for each."""
        low_rank = self.of_kind(LowRankComponent)
        others = [each for each in self.components if not isinstance(each, LowRankComponent)]
        table = match_table([*low_rank, *others], full=full)
        trained = f"{self.parameters:,} parameters are trained"
        return "\n".join([table, *left_out_lines(self.routers), trained])

    def __str__(self) -> str:
        """The match table, with one line for layers that are alike."""
        return self.table()

    def __repr__(self) -> str:
        """One line: the methods, what they train, and how many values."""
        counts = Counter(each.what for each in self.components)
        kinds = ", ".join(f"{count} × {what}" for what, count in counts.items())
        methods = "+".join(config.method for config in self.configs)
        return f"Plan({methods}: {kinds}; {self.parameters:,} parameters)"


def _joined(first: Update, own: Update) -> bool:
    """Have an update take over another one of its kind; False: they are of other kinds."""
    if isinstance(first, LoRAUpdate) and isinstance(own, LoRAUpdate):
        first.join(own)
        return True
    if isinstance(first, ExpertsUpdate) and isinstance(own, ExpertsUpdate):
        first.join(own)
        return True
    return False


def _check_offloaded(found: Plan, materials: Materials) -> None:
    """Refuse updates that are made from weights, or copy modules, which are not in memory.

    Raises:
        AttachError: there are such.
    """
    away = [
        each
        for each in found.components
        if any(is_offloaded(module) for _, module in base_modules(materials.modules[each.path]))
    ]
    fresh, read = materials.tensors is None, uncalled_weights(materials.modules[""]) if away else {}
    problems = [
        f"{each.path}  {each.what}"
        for each in away
        if (each.reads_base and fresh) or isinstance(each, TrainedCopy) or each.path in read
    ]
    if problems:
        raise AttachError.listing(
            "some weights that the adapter needs are offloaded: load the base into memory, "
            "or leave these modules out",
            problems,
        )


def _short_names(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """The paths' last parts if they name exactly the adapted layers, else the paths."""
    # PEFT names parameters apart from modules.
    chosen = {site.named_by for site in sites if not site.is_target_parameter}
    leaves = {path.rpartition(".")[2] for path in chosen}
    named = {path for path, _ in base_modules(model) if path.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves if named == chosen else chosen))


def in_order(components: Iterable[Component], configs: Sequence[MethodConfig]) -> Plan:
    """The plan of components, in the order in which their updates are made."""

    def key(each: Component) -> tuple[int, bool]:
        return each.step, isinstance(each, LowRankComponent) and each.site.tied_to is not None

    # Behind those whose A and B they have.
    return Plan(tuple(sorted(components, key=key)), tuple(configs))


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


def fresh_plan(model: nn.Module, what: MethodConfig | Sequence[MethodConfig]) -> Plan:
    """The plan of a fresh adapter.

    Raises:
        ConfigError: the methods cannot be combined.
        TargetError: a name in the settings matches nothing, or a layer twice; or the model lacks
            what a method needs.
    """
    configs = on_blocks_of(model, as_configs(what))
    check_weights_as_they_were(model)
    found = in_order(wanted(model, configs), configs)
    _check_float(model, found.copies)
    if twice := list(clashes(found.components)):
        raise TargetError.listing("some modules would be changed in two ways", twice)
    if any_ties(configs) and not _tied(found):
        raise TargetError(
            "ensure_weight_tying: neither a target nor a full copy has a weight that another layer "
            "has too; name embed or head, on a base that ties them"
        )
    idle = list(without_effect(model, found.components))
    if idle:
        raise TargetError.listing("some parts of the adapter would do nothing", idle)
    # What changes the output of a copy as a whole comes after it; inside it would be lost.
    inside = [
        each.path
        for each in found.components
        if not isinstance(each, TrainedCopy | TrainedBias)
        and (isinstance(each, LowRankComponent) or each.path not in found.copies)
    ]
    _check_apart(found.copies, inside)
    words = {w for each in configs if isinstance(each, LoRAConfig) for w in each.targets}
    adapted = {site.path for site in found.sites}
    left_out = routers(model) if ALL_LINEAR in words else ()
    return replace(found, routers=tuple(path for path in left_out if path not in adapted))


def _tied(found: Plan) -> bool:
    """Whether something of a plan has the parameters of something else."""
    copies = any(each.again for each in found.of_kind(TrainedCopy))
    return copies or any(site.tied_to is not None for site in found.sites)


def without_effect(model: nn.Module, components: Iterable[Component]) -> Iterator[str]:
    """Yield a line for each component of a module that the model never calls."""
    uncalled = never_called(model)
    for each in components:
        # What is tied to it and called has the same rows.
        ties = isinstance(each, TokenRows) or (isinstance(each, TrainedCopy) and each.keeps_ties)
        if each.path in uncalled and not ties:
            names = " and ".join(uncalled[each.path])
            yield f"{each.path}  is never called: name {names}, which hold the same weight"


def wanted(
    model: nn.Module, configs: Sequence[MethodConfig], *, beside_lora: bool = False
) -> tuple[Component, ...]:
    """What the settings of methods train of a model, each value of the base once.

    Copies are in no other copy, and biases in none; a block's q_bias in DeBERTa, which top-k and
    BitFit each want, belongs to top-k.

    Args:
        model: the base.
        configs: of the methods.
        beside_lora: leave out what LoRA finds by its targets.

    Raises:
        TargetError: a name in the settings matches nothing, or a layer twice; or the model lacks
            what a method needs.
    """
    by_precedence = sorted(configs, key=lambda each: [*FIRST, each.method].index(each.method))
    found = [
        each
        for config in by_precedence
        if not (beside_lora and isinstance(config, LoRAConfig))
        for each in COMPONENTS[type(config)](model, config)
    ]
    found += [
        each
        for config in configs
        if isinstance(config, LoRAConfig)
        for each in token_rows.components(model, config)
    ]
    found += modules_to_save(model, configs)
    paths = outermost([each.path for each in found if isinstance(each, TrainedCopy)])
    unique: dict[object, Component] = {}
    for each in found:
        is_copy = isinstance(each, TrainedCopy)
        if is_copy and each.path not in paths:
            continue
        if isinstance(each, TrainedBias) and is_within(each.path, paths):
            continue
        unique.setdefault(each.path if is_copy else frozenset(each.shapes) or each.path, each)
    copies = [each for each in unique.values() if isinstance(each, TrainedCopy)]
    others = [each for each in unique.values() if not isinstance(each, TrainedCopy)]
    return (*others, *with_ties(model, copies, configs))


def with_singular_vectors(
    model: nn.Module, found: Plan, vectors: Mapping[str, SingularVectors]
) -> Plan:
    """A plan whose low-rank updates start from the inputs of their layers (init eva).

    With `eva_rho` above 1 the ranks are moved to where they explain most.

    Args:
        model: the base.
        found: as the settings alone say.
        vectors: the right singular vectors of the layers' inputs, by path.
    """
    config = next(each for each in found.configs if isinstance(each, LoRAConfig))
    low_rank, sites = found.of_kind(LowRankComponent), list(found.sites)
    if config.eva_rho > 1:
        sites = moved_ranks(sites, vectors, rho=config.eva_rho, use_rslora=config.use_rslora)
    made = []
    for each, site in zip(low_rank, sites, strict=True):
        layer = model.get_submodule(site.path)
        moved = low_rank_component(layer, site, config, role=each.role)
        made.append(replace(moved, vectors=vectors[site.path]))
    return replace(found, components=(*made, *found.components[len(made) :]))


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
