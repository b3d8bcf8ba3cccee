"""The layers that LoRA adapts: the targets of its settings, with their ranks and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from lorakit.adapter.site import LayerKind, Site, scale_of
from lorakit.config.methods import LoRAConfig
from lorakit.errors import TargetError
from lorakit.methods.bitfit import bias_paths, trained_bias
from lorakit.methods.component import Component
from lorakit.methods.lora.lora import (
    is_linear,
    kind_of,
    kind_of_experts,
    matrix_shape,
    takes_bias,
    takes_magnitudes,
    why_not_adaptable,
)
from lorakit.methods.lora.low_rank import low_rank_component
from lorakit.methods.lora.tied import tied_sites, with_tied_targets
from lorakit.models.linear_probe import own_class
from lorakit.models.multihead import IN_PROJ
from lorakit.models.reads import only_read
from lorakit.models.roles import Target
from lorakit.models.routers import is_own_kind
from lorakit.models.target_words import select_targets, targets_by_word

V = TypeVar("V")


def components(model: nn.Module, config: LoRAConfig) -> tuple[Component, ...]:
    """What LoRA trains of a model.

    Raises:
        TargetError: a name in the settings matches nothing, or a layer twice.
    """
    kept = select_targets(model, config.targets, layers=config.layers, exclude=config.exclude)
    owners: Mapping[str, str] = {}
    if config.ensure_weight_tying:
        kept, owners = with_tied_targets(model, kept, config)
    _check_adaptable(model, kept)
    _check_form(model, kept, config)
    _check_dropout(model, kept, config)
    ranks = _by_target(model, kept, config.rank_pattern, "rank_pattern")
    alphas = _by_target(model, kept, config.alpha_pattern, "alpha_pattern")
    _check_ranks(model, {target: ranks.get(target, config.rank) for target in kept}, config)
    _check_patterns(owners, ranks, "rank_pattern")
    _check_patterns(owners, alphas, "alpha_pattern")
    made = [_site(model, target, config, ranks, alphas) for target in kept]
    sites = list(zip(kept, tied_sites(made, owners), strict=True))
    adapted = (
        {target.path for target in kept if target.path == target.module_path}
        if config.bias == "lora"
        else None
    )
    biased = () if config.bias == "none" else bias_paths(model, only=adapted)
    return (
        *(
            low_rank_component(
                model.get_submodule(target.module_path), site, config, role=target.role
            )
            for target, site in sites
        ),
        *(trained_bias(model.get_submodule(path), path, config) for path in biased),
    )


def _check_adaptable(model: nn.Module, kept: Sequence[Target]) -> None:
    problems = [
        f"{target.path} is a {own_class(layer).__name__}: {reason}"
        for target in kept
        if target.path == target.module_path
        for layer in [model.get_submodule(target.path)]
        if (reason := why_not_adaptable(layer)) is not None
    ]
    if problems:
        raise TargetError.listing("LoRA has no update for some targets; exclude them", problems)


def _check_form(model: nn.Module, kept: Sequence[Target], config: LoRAConfig) -> None:
    """Refuse layers that are no matmul, for the forms of LoRA that need one; B's bias needs less.

    Raises:
        TargetError: there are such.
    """
    form = "use_dora" if config.use_dora else "init eva" if config.init == "eva" else None
    others = {target.path: model.get_submodule(target.module_path) for target in kept}
    in_code = any(t.experts for t in kept) or any(map(is_own_kind, others.values()))
    form = "init pissa" if config.init == "pissa" and in_code else form
    takes = takes_magnitudes if form == "use_dora" else is_linear
    problems = [
        f"{path} is a {own_class(layer).__name__}"
        for path, layer in others.items()
        if form and not takes(layer)
    ]
    if config.lora_bias:
        _check_biased(others)
    if problems:
        some = "linear layers, embeddings and convolutions"
        those = some if form == "use_dora" else "linear layers alone"
        raise TargetError.listing(f"{form} is for {those}; exclude the others", problems)


def _check_biased(others: Mapping[str, nn.Module]) -> None:
    """Refuse layers to whose outputs no bias of B is added.

    Raises:
        TargetError: there are such.
    """
    problems = [
        f"{path} is a {own_class(layer).__name__}"
        for path, layer in others.items()
        if not takes_bias(layer)
    ]
    if problems:
        raise TargetError.listing(
            "lora_bias is for linear layers and convolutions; exclude the others", problems
        )


def _check_dropout(model: nn.Module, kept: Sequence[Target], config: LoRAConfig) -> None:
    """Refuse to drop elements of inputs that are not given to the layer.

    Raises:
        TargetError: the model reads the weight of a target by itself.
    """
    read = only_read(model) if config.dropout else ()
    problems = [
        target.name
        for target in (kept if config.dropout else ())
        if target.path in read
        or target.path != target.module_path
        or is_own_kind(model.get_submodule(target.path))
    ]
    if problems:
        raise TargetError.listing(
            "the model reads the weights of some targets by itself, where no input can be dropped: "
            "set dropout to 0, or exclude them",
            problems,
        )


def _check_ranks(model: nn.Module, ranks: Mapping[Target, int], config: LoRAConfig) -> None:
    """Refuse ranks above the number of singular vectors that the weight or the data has.

    Raises:
        TargetError: there are such.
    """
    problems = []
    for target, rank in ranks.items():
        d_out, d_in = _matrix_shape(model, target)
        d_out = d_out if target.rows is None else sum(stop - start for start, stop in target.rows)
        most = {"pissa": min(d_out, d_in), "eva": d_in}.get(config.init, rank)
        if rank > most:
            problems.append(
                f"{target.name}  has rank {rank}, and there are {most} singular vectors"
            )
    if problems:
        raise TargetError.listing(f"init {config.init} cannot start from so many ranks", problems)


def _check_patterns(owners: Mapping[str, str], values: Mapping[Target, V], setting: str) -> None:
    """Refuse to give a tied layer another value than the layer whose A and B it has.

    Raises:
        TargetError: a pattern does.
    """
    by_path = {target.path: value for target, value in values.items()}
    for path, owner in owners.items():
        if path in by_path and by_path[path] != by_path.get(owner):
            raise TargetError(
                f"{setting} gives {path} {by_path[path]}, and not so {owner}, whose A and B it has "
                "(ensure_weight_tying): name both"
            )


def _by_target(
    model: nn.Module, kept: Sequence[Target], pattern: Mapping[str, V], setting: str
) -> dict[Target, V]:
    """The value that a pattern gives to each target; the last word that names it counts.

    Raises:
        TargetError: a word names none of the adapted targets.
    """
    found = targets_by_word(model, pattern, what=setting)
    idle = [
        f"{word!r} names none of the adapted layers"
        for word, its_targets in found.items()
        if not set(its_targets) & set(kept)
    ]
    if idle:
        raise TargetError.listing(f"{setting} says something of layers that are not adapted", idle)
    return {target: pattern[word] for word, its_targets in found.items() for target in its_targets}


def _site(
    model: nn.Module,
    target: Target,
    config: LoRAConfig,
    ranks: Mapping[Target, int],
    alphas: Mapping[Target, float],
) -> Site:
    rank = ranks.get(target, config.rank)
    alpha = alphas.get(target, config.alpha)
    numerator = float(rank if alpha is None else alpha)
    layer = model.get_submodule(target.module_path)
    scale = scale_of(rank, numerator, use_rslora=config.use_rslora)
    frozen = rank if config.init == "pissa" else 0
    if frozen:
        rank += frozen
        numerator = scale / scale_of(rank, 1.0, use_rslora=config.use_rslora)
    return Site(
        path=target.path,
        role=target.role if target.rows is not None else None,
        rows=target.rows,
        rank=rank,
        alpha=numerator,
        scale=scale,
        frozen=frozen,
        groups=getattr(layer, "groups", 1),
        kind=_kind(layer, target),
        layer_rows=None if target.rows is None else _matrix_shape(model, target)[0],
    )


def _matrix_shape(model: nn.Module, target: Target) -> tuple[int, int]:
    """(d_out, d_in) of a target's whole matrix, or of each expert's."""
    each = target.experts
    if each is None:
        layer = model.get_submodule(target.module_path)
        return matrix_shape(layer, IN_PROJ if target.is_in_proj else "weight")
    return each.d_out, each.d_in


def _kind(layer: nn.Module, target: Target) -> LayerKind:
    if target.experts is not None:
        return kind_of_experts(target.experts)
    return "in_proj" if target.is_in_proj else kind_of(layer)
