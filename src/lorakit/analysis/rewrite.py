"""An adapter made of ΔWs: each is written as B·A of its own rank, with the scale 1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.analysis.delta import LowRankDelta
from lorakit.analysis.svd import SVD
from lorakit.config.methods import LoRAConfig, MethodConfig


@dataclass(frozen=True, eq=False)
class NewUpdate:
    """One update of a new adapter."""

    site: Site
    a: Tensor
    b: Tensor

    @staticmethod
    def of(place: Site, svd: SVD, inner: Sequence[int], dtype: torch.dtype) -> NewUpdate:
        """The update that is a decomposition's ΔW, at the decomposition's rank.

        Where ΔW is 0 it has rank 1, with zeros: no tool knows a rank of 0.

        Args:
            place: the layer or slice.
            svd: ΔW, cut to the rank that it gets.
            inner: the shape of A after its rank.
            dtype: of A and B.
        """
        rank = max(1, svd.rank)
        a, b = factors(svd, rank)
        own = {"rank": rank, "alpha": float(rank), "scale": 1.0, "frozen": 0, "tied_to": None}
        ones = (1,) * (len(inner) - 1)
        return NewUpdate(
            Site(**{**vars(place), **own}),
            a.reshape(rank, *inner).to(dtype),
            b.reshape(b.shape[0], rank, *ones).to(dtype),
        )

    @cached_property
    def delta(self) -> LowRankDelta:
        """ΔW as the rounded factors give it."""
        return LowRankDelta(self.b.flatten(1).double(), self.a.flatten(1).double())

    def missed(self, exact: LowRankDelta | Tensor) -> tuple[float, float]:
        """‖ΔW' − ΔW‖ and ‖ΔW‖: how far it is from what it stands for, and how large that is."""
        if isinstance(exact, Tensor):
            return float((self.delta.dense() - exact).norm()), float(exact.norm())
        return distance(self.delta, exact), exact.norm()


def factors(svd: SVD, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank), of equal norms, whose product is that of the SVD."""
    root = svd.s[:rank].sqrt()
    a, b = root[:, None] * svd.v[:, :rank].mT, svd.u[:, :rank] * root
    missing = rank - len(root)
    if missing > 0:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return a.contiguous(), b.contiguous()


def distance(one: LowRankDelta, other: LowRankDelta) -> float:
    """‖ΔW₁ − ΔW₂‖_F, from the factors of the difference."""
    both = LowRankDelta(torch.cat([one.b, -other.b], dim=1), torch.cat([one.a, other.a]))
    return both.norm()


def relative_error(missed: Iterable[tuple[float, float]]) -> float:
    """‖ΔW' − ΔW‖/‖ΔW‖ over all sites together, from the two norms of each."""
    pairs = list(missed)
    whole = math.hypot(*(norm for _, norm in pairs))
    return math.hypot(*(lost for lost, _ in pairs)) / whole if whole else 0.0


@dataclass(frozen=True, kw_only=True)
class NewAdapter:
    """A new adapter without its updates: settings, biases, and modules in full."""

    like: Adapter
    """An adapter of the same base."""
    configs: tuple[MethodConfig, ...]
    """Its settings; those of LoRA get the ranks and the scale of the updates."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors that belong to no site."""
    copied_modules: tuple[str, ...] = ()
    target_modules: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def of(self, updates: Sequence[NewUpdate]) -> Adapter:
        """The adapter with some updates, and without a card."""
        sites = tuple(update.site for update in updates)
        tensors = {f"{each.site.name}.lora_a": each.a for each in updates}
        tensors |= {f"{each.site.name}.lora_b": each.b for each in updates}
        return Adapter(
            configs=tuple(_with_ranks(config, sites) for config in self.configs),
            sites=sites,
            tensors={**tensors, **self.others},
            copied_modules=self.copied_modules,
            target_modules=self.target_modules,
            base=self.like.base,
            unverified=self.unverified,
        )


def _with_ranks(config: MethodConfig, sites: Sequence[Site]) -> MethodConfig:
    """LoRA's settings with the rank of every site, and the scale 1; others as they are."""
    if not isinstance(config, LoRAConfig):
        return config
    ranks = {site.name: site.rank for site in sites}
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    return config.model_copy(
        update={
            "rank": usual,
            "alpha": None,
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
            "alpha_pattern": {},
            "use_rslora": False,
            # They say how other A and B than these started and were trained.
            "init": "kaiming",
            "svd_iterations": None,
            "eva_rho": 1.0,
            "freeze_a": False,
            # The nearest updates of both ends are each end's own.
            "ensure_weight_tying": False,
        }
    )


def dtype_of(adapters: Sequence[Adapter]) -> torch.dtype:
    """The widest precision among the factors of some adapters."""
    return reduce(
        torch.promote_types,
        (
            adapter.tensors[f"{site.name}.lora_{end}"].dtype
            for adapter in adapters
            for site in adapter.sites
            for end in "ab"
        ),
    )


def inner_shape(adapter: Adapter, site: Site) -> tuple[int, ...]:
    """The shape of a site's A after its rank: (d_in,), or (c_in / groups, *kernel)."""
    return tuple(adapter.tensors[f"{site.name}.lora_a"].shape[1:])


def beside_sites(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter that belong to no site."""
    ends = ("a", "b", "magnitude")
    own = {f"{site.name}.lora_{end}" for site in adapter.sites for end in ends}
    return {name: tensor for name, tensor in adapter.tensors.items() if name not in own}
