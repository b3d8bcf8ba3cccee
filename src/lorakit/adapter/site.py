"""A site: one low-rank update of a layer, or of a slice of a fused layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RowRanges = tuple[tuple[int, int], ...]
"""Half-open ranges (start, stop) of a fused layer's output rows."""
LayerKind = Literal[
    "linear",
    "transposed",
    "embedding",
    "conv",
    "experts",
    "experts-transposed",
    "in_proj",
    "out_proj",
    "router",
]
"""How a layer holds its matrix; transposed: (d_in, d_out), as transformers' Conv1D does; experts: a
parameter with one matrix for each expert; in_proj and out_proj: those of nn.MultiheadAttention;
router: in a module of its own kind, which makes more of x than W·x."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One low-rank update: its layer or slice, its rank, and its scale."""

    path: str
    """Dotted path of the module in the base model; of experts and in_proj, of the parameter."""
    rank: int
    """Inner width r, including the ranks that do not train."""
    alpha: float
    """Numerator of the scale."""
    scale: float
    """The factor on B·A·x: α/r, or α/√r."""
    role: str | None = None
    """The role, where the site is a slice of a fused layer; None for a whole layer."""
    rows: RowRanges | None = None
    """Output rows of the slice; None for a whole layer."""
    groups: int = 1
    """Groups of a convolution, which share A; 1 for every other layer."""
    kind: LayerKind = "linear"
    """The kind of layer; other tools' files depend on it, the update does not."""
    layer_rows: int | None = None
    """Output rows of the whole layer, where the site is a slice of it."""
    frozen: int = 0
    """How many of the ranks do not train, counted from the end (PiSSA)."""

    tied_to: str | None = None
    """The path of the site whose A and B it has, as the two layers have one weight (see
    `methods/lora/tied.py`)."""

    @property
    def name(self) -> str:
        """The path, with the role in brackets for a slice."""
        return self.path if self.rows is None else f"{self.path}[{self.role}]"

    @property
    def is_of_experts(self) -> bool:
        """Whether it changes one matrix for each expert."""
        return self.kind in ("experts", "experts-transposed")

    @property
    def is_target_parameter(self) -> bool:
        """Whether PEFT names it among its `target_parameters`."""
        return self.is_of_experts or self.kind == "router"

    @property
    def is_of_parameter(self) -> bool:
        """Whether its path is that of a parameter, and not of a module."""
        return self.is_of_experts or self.kind == "in_proj"

    @property
    def module_path(self) -> str:
        """The dotted path of the module that is adapted."""
        return self.path.rpartition(".")[0] if self.is_of_parameter else self.path

    @property
    def parameter(self) -> str:
        """The name of the module's parameter that is changed."""
        return self.path.rpartition(".")[2] if self.is_of_parameter else "weight"

    @property
    def named_by(self) -> str:
        """The path by which PEFT's settings name it."""
        return named_by(self.path, self.kind)


def named_by(path: str, kind: LayerKind) -> str:
    """The path by which PEFT's settings name a layer.

    Of nn.MultiheadAttention it is that of the whole, and of a router that of its parameter.

    Args:
        path: of the layer or parameter.
        kind: how it holds its matrix.
    """
    if kind == "router":
        return f"{path}.weight"
    return path.rpartition(".")[0] if kind in ("in_proj", "out_proj") else path


def scale_of(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """The factor on B·A: α/r (section 4.1), or α/√r (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank
