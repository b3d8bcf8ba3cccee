"""The weights of a base beside the ΔW of an adapter, read once and layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.analysis.checks import left_out, not_finite, shape_of
from lorakit.analysis.delta import Delta, DenseDelta, LowRankDelta, low_rank_delta
from lorakit.attachment.changed_weights import other_weights
from lorakit.attachment.state import attachment_of, identity_of
from lorakit.errors import AnalysisError
from lorakit.kernels import plain
from lorakit.methods.lora.lora import matrix_of, matrix_shape
from lorakit.models.base import base_modules, is_offloaded, unwrapped
from lorakit.models.load import fresh_heads
from lorakit.models.paths import is_within
from lorakit.models.quantized_weight import float_weight
from lorakit.upstream.private_names import own_parameters


@dataclass(frozen=True, eq=False)
class Change:
    """One weight of a base, and what an adapter adds to it."""

    name: str
    """The site's name, or the path of a layer whose weight is held in full."""
    delta: Delta
    weight: Float[Tensor, "d_out d_in"]
    """W, in the base's own precision."""
    rank: int
    """The rank that the adapter has there."""

    @property
    def weight_norm(self) -> float:
        """‖W‖_F, summed in float32 at least."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        return float(torch.linalg.vector_norm(self.weight, dtype=exact))


class BaseWeights:
    """The weights of a model that an adapter changes."""

    def __init__(self, adapter: Adapter, model: nn.Module, *, allow_other_base: bool) -> None:
        """Make sure that they are there, and those that the adapter was trained on.

        Raises:
            AnalysisError: every reason why they are not.
        """
        model = unwrapped(model)
        self._adapter = adapter
        self._layers = dict(base_modules(model))
        self._whole = dict(self._in_full(fresh_heads(model)))
        problems = [*_problems_of_base(adapter, model, allow_other_base), *not_finite(adapter)]
        if any(site.is_of_experts for site in adapter.sites):
            problems += left_out(adapter, with_base=True)
        else:
            problems += [line for site in adapter.sites for line in self._problems(site)]
        if not adapter.sites and not self._whole:
            problems += left_out(adapter, with_base=True)
        if problems:
            raise AnalysisError.listing("ΔW cannot be put beside the base's weights", problems)

    def changes(self) -> Iterator[Change]:
        """Every weight that the adapter changes; each is read when its turn comes."""
        tensors = self._adapter.tensors
        for site in self._adapter.sites:
            weight = matrix_of(self._layers[site.module_path], site)
            low_rank = low_rank_delta(self._adapter, site)
            rows = tensors.get(f"{site.name}.lora_magnitude")
            delta = low_rank if rows is None else _with_magnitudes(weight, low_rank, rows)
            yield Change(site.name, delta, weight, site.rank)
        for path, tensor in self._whole.items():
            weight = float_weight(self._layers[path]).detach().flatten(1)
            whole = DenseDelta(tensor.detach().flatten(1).double() - weight.double())
            yield Change(path, whole, weight, whole.rank)

    def _in_full(self, fresh: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The path and the new weight of each layer that the adapter holds in full."""
        for name, tensor in self._adapter.tensors.items():
            path, _, leaf = name.rpartition(".")
            layer = self._layers.get(path)
            if leaf != "weight" or tensor.dim() < 2 or layer is None or is_within(path, fresh):
                continue
            own = own_parameters(layer).get("weight")
            if own is not None and own.shape == tensor.shape and not own.is_meta:
                yield path, tensor

    def _problems(self, site: Site) -> Iterator[str]:
        layer, shape = self._layers.get(site.module_path), shape_of(self._adapter, site)
        if layer is None:
            yield f"{site.path}  is not a module of this model"
            return
        weight = own_parameters(layer).get(site.parameter)
        if is_offloaded(layer) or (weight is not None and weight.is_meta):
            yield f"{site.path}  its weight is not in memory: load the base on the CPU or a GPU"
            return
        rows, columns = matrix_shape(layer, site.parameter)
        if site.rows is not None:
            rows = sum(stop - start for start, stop in site.rows)
        if (rows, columns) != shape:
            yield f"{site.name}  is {shape[0]}×{shape[1]} in the adapter, {rows}×{columns} here"


def _problems_of_base(adapter: Adapter, model: nn.Module, allow_other_base: bool) -> Iterator[str]:
    state = attachment_of(model)
    if state is not None and state.route.merged is not None:
        yield f"adapter {state.route.merged!r} is merged into the weights: lk.unmerge(model) first"
        return
    identity = identity_of(model)
    if not allow_other_base:
        yield from other_weights(model, adapter)
    if allow_other_base or adapter.base is None or identity is None:
        return
    difference = adapter.base.difference(identity)
    if difference is not None:
        yield (
            f"the adapter was trained on another base ({adapter.base.name or 'unnamed'}): "
            f"{difference}; allow_other_base=True accepts that"
        )


def _with_magnitudes(weight: Tensor, delta: LowRankDelta, magnitude: Tensor) -> DenseDelta:
    """DoRA's ΔW: the rows of W + scale·B·A with the trained magnitudes, less W."""
    before = weight.double()
    direction = before + delta.dense()
    rows = magnitude.detach().double() / plain.norms(direction)
    return DenseDelta(direction * rows[:, None] - before)
