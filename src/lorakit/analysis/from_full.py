"""An adapter from full fine-tuning: the nearest one of a rank to what it changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorakit.adapter.adapter import Adapter
from lorakit.analysis.checkpoint_weights import CheckpointWeights
from lorakit.analysis.compressing import check_size, cut
from lorakit.analysis.delta import Delta
from lorakit.analysis.rewrite import NewAdapter, NewUpdate, relative_error
from lorakit.analysis.svd import SVD, top_svd
from lorakit.attachment.state import identity_of
from lorakit.methods.lora.lora import parameter_shapes
from lorakit.models.base import base_modules, unwrapped


def from_checkpoint(
    model: nn.Module,
    tuned: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] | str = ("all-linear",),
    seed: int = 0,
) -> Adapter:
    """The adapter that is nearest to what full fine-tuning changed (Eckart and Young).

    Of each layer's difference, which is formed as a matrix in float64, the largest singular values
    are kept. With `rank`, those of a layer whose smaller side is above 1,024 are from a randomised
    decomposition; with `energy` all are exact, which takes minutes for a layer of width 4,096.

    Args:
        model: the base, loaded; it is not changed.
        tuned: the same model after fine-tuning, loaded.
        rank: that of each update.
        energy: or the share of each ΔW's Σσ² to keep, above 0 and up to 1.
        targets: the layers, in LoRAConfig's words.
        seed: of the randomised decompositions.

    Returns:
        The adapter, in float32. `card["from_checkpoint"]` has `relative_error`, ‖ΔW' − ΔW‖/‖ΔW‖
        over the layers, its square `energy_lost`, the parameters that fine-tuning has changed
        outside them, `left_out`, and their share of all that changed, `share_left_out`.

    Raises:
        AnalysisError: neither or both of rank and energy are given, or the models have other
            layers.
        TargetError: a target names nothing in the model.

    Examples:
        >>> import copy
        >>> tuned = copy.deepcopy(model)
        >>> with torch.no_grad():
        ...     tuned.model.layers[3].self_attn.q_proj.weight[5] += 0.1
        >>> adapter = lk.analysis.from_checkpoint(model, tuned, rank=1, targets=["q"])
        >>> adapter.card["from_checkpoint"]["energy_lost"] < 1e-9
        True
    """
    check_size(energy, rank)
    weights = CheckpointWeights(model, tuned, targets)
    layers = dict(base_modules(unwrapped(model)))
    updates, missed = [], []
    for site, change in zip(weights.sites, weights.changes(), strict=True):
        svd = _nearest(change.delta, energy, rank, seed)
        a, _ = parameter_shapes(layers[site.path], site)
        updates.append(NewUpdate.of(site, svd, a[1:], torch.float32))
        missed.append(updates[-1].missed(change.delta.dense()))
    template = weights.plan.adapter(model, identity_of(model))
    made = NewAdapter(
        like=template, configs=template.configs, target_modules=template.target_modules
    ).of(updates)
    size = {"energy": energy} if rank is None else {"rank": rank}
    told = size | _losses(missed, weights.outside())
    return replace(made, card={**template.card, "from_checkpoint": told})


def _nearest(delta: Delta, energy: float | None, rank: int | None, seed: int) -> SVD:
    """The largest singular values of ΔW with their vectors: of a rank, or of a share of Σσ²."""
    if rank is None:
        return cut(delta.svd(), energy, None)
    matrix = delta.dense()
    return top_svd(matrix, min(rank, *matrix.shape), seed=seed)[0]


def _losses(missed: Sequence[tuple[float, float]], outside: Mapping[str, float]) -> dict[str, Any]:
    """What the adapter lacks of what fine-tuning changed, for its card.

    Args:
        missed: of each layer, ‖ΔW' − ΔW‖ and ‖ΔW‖.
        outside: the norm of the change of each parameter that the adapter does not have.
    """
    error = relative_error(missed)
    within, rest = math.hypot(*(norm for _, norm in missed)), math.hypot(*outside.values())
    whole = math.hypot(within, rest)
    return {
        "relative_error": error,
        "energy_lost": error**2,
        "left_out": list(outside),
        "share_left_out": (rest / whole) ** 2 if whole else 0.0,
    }
