"""A low-rank update as a component: A and B of one site, B's bias, and DoRA's magnitudes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.adapter.site import Site
from lorakit.config.base import dtype_name
from lorakit.config.methods import LoRAConfig
from lorakit.methods.component import Component, Materials, Shape
from lorakit.methods.lora.eva import SingularVectors
from lorakit.methods.lora.experts import ExpertsUpdate, part_key
from lorakit.methods.lora.init import fresh_tensors
from lorakit.methods.lora.lora import LowRank, parameter_shapes
from lorakit.methods.lora.parameter_update import ParameterUpdate
from lorakit.methods.lora.pissa import split_frozen_factors
from lorakit.methods.lora.read_parameter import ReadParameterUpdate
from lorakit.methods.lora.router import RouterUpdate
from lorakit.methods.lora.tied import TiedLowRank
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.models.base import device_of


@dataclass(frozen=True, kw_only=True)
class LowRankComponent(Component):
    """One low-rank update of a layer, or of a slice of a fused layer."""

    site: Site
    role: str | None
    """What the layer is called in its family, where that is known."""
    config: LoRAConfig
    shape_a: Shape
    """(rank, d_in), or as the kind of layer has it (docs/design/adapter.md)."""
    shape_b: Shape
    """(d_out, rank), likewise."""
    vectors: SingularVectors | None = field(default=None, compare=False, repr=False)
    """For init eva: the right singular vectors of the layer's inputs."""

    step = 0
    what = "low-rank update"

    @property
    def reads_base(self) -> bool:
        """Whether a fresh start is made from the base's own values."""
        return self.config.use_dora or self.config.init == "pissa"

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The shapes of A, of B, and of its bias or DoRA's magnitudes (rows of the site,)."""
        name, rows = self.site.name, self.shape_b[:1]
        shapes = {f"{name}.lora_a": self.shape_a, f"{name}.lora_b": self.shape_b}
        vectors = {"lora_bias": self.config.lora_bias, "lora_magnitude": self.config.use_dora}
        return shapes | {f"{name}.{end}": rows for end, is_there in vectors.items() if is_there}

    @property
    def matrices(self) -> int:
        """How many matrices it changes: one, or one for each expert."""
        return self.shape_a[0] if self.site.is_of_experts else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_out, d_in) of a matrix, or of the slice of it."""
        if self.site.is_of_experts:
            return self.shape_b[1], self.shape_a[2]
        return self.shape_b[0], math.prod(self.shape_a[1:])

    @property
    def parameters(self) -> int:
        """The number of values that are trained: not those of frozen factors, or another's."""
        if self.site.tied_to is not None:
            return 0
        d_out, d_in = self.matrix_shape
        of_rank = d_out if self.config.freeze_a else d_out + d_in
        trained = (self.site.rank - self.site.frozen) * of_rank * self.matrices
        return trained + (d_out if self.config.use_dora or self.config.lora_bias else 0)

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of the match table."""
        site, size = self.site, "×".join(map(str, self.matrix_shape))
        size = f"{self.matrices} × {size}" if site.is_of_experts else size
        rank = str(site.rank) if site.tied_to is None else f"{site.rank}, tied"
        return site.name, self.role or "", size, rank, f"{site.scale:g}"

    def update(self, materials: Materials) -> LoRAUpdate | ParameterUpdate:
        """The update of the layer; a fresh A is drawn from torch's global generator."""
        if self.site.tied_to is not None:
            owner = cast(LowRank, materials.of_sites[self.site.tied_to])
            return LoRAUpdate({"whole": TiedLowRank(self.site, self.config, owner)})
        layer = materials.modules[self.path]
        device = device_of(layer)
        if materials.tensors is None:
            own, copy = self._fresh(layer, device), False
        else:
            own, copy = {n: materials.tensors[n] for n in self.shapes}, materials.copy
        weights = {
            name.rpartition(".")[2]: values.to(device, copy=copy)
            for name, values in split_frozen_factors((self.site,), own).items()
        }
        part = LowRank(self.site, self.config, weights)
        materials.of_sites[self.site.name] = part
        if self.site.is_of_experts:
            return ExpertsUpdate({part_key(part): part})
        if self.site.kind == "router":
            return RouterUpdate({self.site.parameter: part})
        if self.site.is_of_parameter:
            return ReadParameterUpdate({self.site.parameter: part})
        return LoRAUpdate({self.site.role or "whole": part})

    def _fresh(self, layer: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a fresh start, by their names in an adapter."""
        dtype, name = getattr(torch, dtype_name(self.config.dtype)), self.site.name
        if device.type == "meta":
            empty = torch.empty
            return {n: empty(s, device="meta", dtype=dtype) for n, s in self.shapes.items()}
        made = fresh_tensors(layer, self.site, self.config, self.vectors)
        return {f"{name}.{end}": values.to(device, dtype) for end, values in made.items()}


def low_rank_component(
    layer: nn.Module, site: Site, config: LoRAConfig, *, role: str | None = None
) -> LowRankComponent:
    """The component of a site on a layer of a base."""
    a, b = parameter_shapes(layer, site)
    return LowRankComponent(
        path=site.module_path,
        method=config.method,
        site=site,
        role=role or site.role,
        config=config,
        shape_a=a,
        shape_b=b,
    )
