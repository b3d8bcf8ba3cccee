"""Layers that have one weight, and one A and B: a head gets its embedding's, turned.

For W + scale·B·A to stay one weight for both, the head's A must be the transpose of the embedding's
B, and its B that of the embedding's A: an embedding's matrix is (d, vocabulary), the head's
(vocabulary, d).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lorakit.adapter.site import Site
from lorakit.adapter.tied_sites import is_turned
from lorakit.config.methods import LoRAConfig, MethodConfig
from lorakit.errors import TargetError
from lorakit.methods.lora.lora import LowRank
from lorakit.models.base import base_modules
from lorakit.models.roles import Target, never_called, targets_of
from lorakit.models.target_words import targets_by_word
from lorakit.upstream.private_names import own_parameters


class TiedLowRank(LowRank):
    """The A and B of a site that are another site's."""

    owner: LowRank

    def __init__(self, site: Site, config: LoRAConfig, owner: LowRank) -> None:
        """Have the parameters of another site, which trains them."""
        super().__init__(site, config, {})
        # No child: the owner is in its own layer.
        vars(self)["owner"] = owner
        shared = {f"tied_{name}": each for name, each in owner.named_parameters()}
        own_parameters(self).update(shared)

    @property
    def is_turned(self) -> bool:
        """Whether A and B are the transposes of the owner's B and A."""
        return is_turned(self.site, self.owner.site)

    @property
    def a(self) -> Tensor:
        """A, (rank, d_in)."""
        return self.owner.b.mT if self.is_turned else self.owner.a

    @property
    def b(self) -> Tensor:
        """B, (d_out, rank)."""
        return self.owner.a.mT if self.is_turned else self.owner.b

    lora_a, lora_b = a, b  # type: ignore[assignment]

    def let_train(self) -> None:
        """Nothing: the owner's settings say what trains."""

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing: the parameters are the owner's."""
        return iter(())

    def shared_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield A and B."""
        yield from (("lora_a", self.a), ("lora_b", self.b))

    def add_to(self, matrix: Tensor) -> None:
        """Add ΔW in place, in the order of the owner's, so that the sums have the same bits."""
        self.owner.add_to(matrix.T if self.is_turned else matrix)


def layers_of_one_weight(model: nn.Module) -> list[list[str]]:
    """The paths of the embeddings and Linears that share a weight, an embedding first.

    Those that the model never calls are left out.
    """
    uncalled = never_called(model)
    by_weight: dict[int, list[str]] = {}
    embeddings = set()
    for path, module in base_modules(model):
        weight = own_parameters(module).get("weight")
        if weight is None or path in uncalled or not isinstance(module, nn.Embedding | nn.Linear):
            continue
        by_weight.setdefault(id(weight), []).append(path)
        embeddings |= {path} if isinstance(module, nn.Embedding) else set()
    shared = [paths for paths in by_weight.values() if len(paths) > 1]
    return [sorted(paths, key=lambda path: path not in embeddings) for paths in shared]


def tied_to(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The paths of the layers that have the weight of one of some modules, without those."""
    modules = dict(base_modules(model))
    given = set(paths)
    weights = {id(own_parameters(modules[path]).get("weight")) for path in given}
    return [
        path
        for group in layers_of_one_weight(model)
        for path in group
        if path not in given and id(own_parameters(modules[path])["weight"]) in weights
    ]


def any_ties(configs: Iterable[MethodConfig]) -> bool:
    """Whether some settings are LoRA's and ask for tied layers."""
    return any(isinstance(each, LoRAConfig) and each.ensure_weight_tying for each in configs)


def with_tied_targets(
    model: nn.Module, kept: Sequence[Target], config: LoRAConfig
) -> tuple[tuple[Target, ...], dict[str, str]]:
    """The targets, with every layer that has a target's weight, and whose A and B each has.

    Args:
        model: the base.
        kept: the targets that the settings select.
        config: the settings.

    Returns:
        The targets in module order, and for tied ones the path whose A and B they have, by path.

    Raises:
        TargetError: `exclude` names one of them.
    """
    chosen = {target.path for target in kept}
    owners: dict[str, str] = {}
    for first, *others in layers_of_one_weight(model):
        if chosen & {first, *others}:
            owners |= dict.fromkeys(others, first)
    added = {*owners, *owners.values()}
    out = targets_by_word(model, config.exclude, what="exclude")
    against = added & {target.path for found in out.values() for target in found}
    if against:
        raise TargetError(
            f"exclude names {', '.join(sorted(against))}, and ensure_weight_tying adapts it with "
            "the layer of the same weight: leave out both, or neither"
        )
    selected = chosen | added
    whole = (t for t in targets_of(model) if t.path in selected)
    return tuple(t for t in whole if t in kept or (t.path in added and t.rows is None)), owners


def tied_sites(sites: Iterable[Site], owners: Mapping[str, str]) -> Iterator[Site]:
    """Yield the sites, of which tied ones have the rank and scale of their owner.

    Args:
        sites: as the settings give them.
        owners: the path whose A and B a layer has, by the layer's path.
    """
    every = list(sites)
    by_path = {site.path: site for site in every}
    for site in every:
        owner = by_path.get(owners.get(site.path, ""))
        if owner is None:
            yield site
        else:
            yield replace(
                site,
                tied_to=owner.path,
                rank=owner.rank,
                alpha=owner.alpha,
                scale=owner.scale,
            )
