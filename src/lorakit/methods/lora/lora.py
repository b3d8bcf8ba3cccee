"""LoRA: h = W₀x + scale·B·A·x, A and B of one layer or slice (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapter.site import LayerKind, RowRanges, Site
from lorakit.config.methods import LoRAConfig
from lorakit.kernels import fused, plain
from lorakit.kernels.dropout import Dropout
from lorakit.methods.lora.dora import RowNorms, rescaled
from lorakit.models.base import base_parameter
from lorakit.models.experts import ExpertMatrices, expert_matrices
from lorakit.models.linear_probe import own_class, why_no_matmul
from lorakit.models.quantized_weight import float_weight, is_quantized
from lorakit.models.routers import is_own_kind
from lorakit.upstream.private_names import (
    NonDynamicallyQuantizableLinear,
    convolution_of,
    own_parameters,
)

ConvNd = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parameter_shapes(layer: nn.Module, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a site on a layer (the table in docs/design/adapter.md)."""
    if site.is_of_experts:
        each = matrices_of(layer, site)
        rows = sum(stop - start for start, stop in site.rows or ((0, each.d_out),))
        return (each.count, site.rank, each.d_in), (each.count, rows, site.rank)
    if isinstance(layer, nn.Embedding):
        return (site.rank, layer.num_embeddings), (layer.embedding_dim, site.rank)
    if isinstance(layer, ConvNd):
        ones = (1,) * len(layer.kernel_size)
        inner = (layer.in_channels // layer.groups, *layer.kernel_size)
        return (site.rank, *inner), (layer.out_channels, site.rank, *ones)
    d_out, d_in = matrix_shape(layer, site.parameter)
    if site.rows is not None:
        d_out = sum(stop - start for start, stop in site.rows)
    return (site.rank, d_in), (d_out, site.rank)


def matrix_shape(layer: nn.Module, parameter: str = "weight") -> tuple[int, int]:
    """(d_out, d_in) of a layer's weight seen as a matrix, or of another parameter of its own."""
    if parameter != "weight":
        d_out, d_in = base_parameter(layer, parameter).shape
        return d_out, d_in
    if is_quantized(layer):
        return cast(int, layer.out_features), cast(int, layer.in_features)
    first, *others = cast(Tensor, layer.weight).shape
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return others[0], first
    return first, math.prod(others)


def matrices_of(module: nn.Module, site: Site) -> ExpertMatrices:
    """The parameter of a module of experts that a site changes."""
    return next(each for each in expert_matrices(module) if each.name == site.parameter)


def matrix_of(layer: nn.Module, site: Site) -> Tensor:
    """The part of a layer's weight that a site changes, as a matrix (d_out, d_in).

    Of experts a matrix for each, (experts, d_out, d_in).
    """
    if site.is_of_experts:
        stack = base_parameter(layer, site.parameter).detach()
        stack = stack.mT if site.kind == "experts-transposed" else stack
        return stack if site.rows is None else stack[:, positions(site.rows, stack.device)]
    if site.is_of_parameter:
        return base_parameter(layer, site.parameter).detach()
    weight = float_weight(layer).detach()
    matrix = weight.T if isinstance(layer, Conv1D | nn.Embedding) else weight.flatten(1)
    if site.rows is None:
        return matrix
    return torch.cat([matrix[start:stop] for start, stop in site.rows])


def kind_of(layer: nn.Module) -> LayerKind:
    """The form in which a layer holds its matrix."""
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, ConvNd):
        return "conv"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "out_proj"
    if is_own_kind(layer):
        return "router"
    return "transposed" if isinstance(layer, Conv1D) else "linear"


def kind_of_experts(matrices: ExpertMatrices) -> LayerKind:
    """The form in which a parameter holds the matrices of experts."""
    return "experts-transposed" if matrices.transposed else "experts"


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a matmul with its weight."""
    return isinstance(layer, nn.Linear | Conv1D)


def takes_magnitudes(layer: nn.Module) -> bool:
    """Whether the rows of what a layer computes with can have magnitudes (DoRA)."""
    return is_linear(layer) or isinstance(layer, (nn.Embedding, *ConvNd))


def takes_bias(layer: nn.Module) -> bool:
    """Whether a bias of B can be added to what a layer computes."""
    return isinstance(layer, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether LoRA knows what this layer computes from its weight."""
    return why_not_adaptable(layer) is None


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Why LoRA has no update for a layer; None: it has."""
    kinds = (nn.Linear, Conv1D, nn.Embedding, *ConvNd)
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    own = own_class(layer)
    if is_own_kind(layer):
        return None
    if kind is None:
        return "it is no matmul, convolution or embedding"
    if getattr(layer, "max_norm", None) is not None:
        return "its max_norm rescales rows of the weight whenever they are looked up"
    if own.forward is kind.forward or is_quantized(layer):
        return None
    # A subclass may compute something else, as OPT's positions do, or the same, as FalconLinear.
    if isinstance(layer, nn.Linear):
        return why_no_matmul(layer)
    if isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale"):
        return None
    return f"it computes something else than a plain {kind.__name__}"


ENDS = ("lora_a", "lora_b", "lora_bias", "lora_magnitude", "frozen_a", "frozen_b")
"""The last parts of the names of a site's tensors in a model; the first two are always there."""


class LowRank(nn.Module):
    """A and B of one site; B's bias, frozen factors (PiSSA), the rows' magnitudes (DoRA)."""

    site: Site
    dropout: float
    freezes_a: bool
    norms: RowNorms
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_bias: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    frozen_a: nn.Parameter | None
    frozen_b: nn.Parameter | None

    def __init__(self, site: Site, config: LoRAConfig, weights: Mapping[str, Tensor]) -> None:
        """Take the tensors of a site, by those of `ENDS` that it has."""
        super().__init__()
        # Past nn.Module.__setattr__, whose checks take as long as all the rest of making these.
        vars(self).update(
            site=site,
            dropout=config.dropout,
            freezes_a=config.freeze_a,
            norms=RowNorms(),
            training=False,
        )
        own_parameters(self).update(dict.fromkeys(ENDS))
        own_parameters(self).update((end, _frozen(values)) for end, values in weights.items())

    @property
    def a(self) -> Tensor:
        """A of all ranks, (rank, d_in)."""
        return self.lora_a if self.frozen_a is None else torch.cat([self.lora_a, self.frozen_a])

    @property
    def b(self) -> Tensor:
        """B of all ranks, (d_out, rank)."""
        if self.frozen_b is None:
            return self.lora_b
        return torch.cat([self.lora_b, self.frozen_b], dim=1)

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield its own tensors by the ends of their names."""
        return self.named_parameters()

    def shared_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the site that another site's parameters hold."""
        return iter(())

    def let_train(self) -> None:
        """Let the tensors that the settings train take gradients."""
        self.lora_a.requires_grad_(not self.freezes_a)
        for trained in (self.lora_b, self.lora_bias, self.lora_magnitude):
            if trained is not None:
                trained.requires_grad_()

    def rescaled(self, layer: nn.Module, output: Tensor) -> Tensor:
        """W·x + bias, where the rows of W have the trained magnitudes."""
        assert self.lora_magnitude is not None
        entries = None if self.site.rows is None else positions(self.site.rows, output.device)
        with torch.no_grad():
            weight = cast(Tensor, layer.weight)
            norms = self.norms.of(
                [weight, *self.parameters()],
                lambda: plain.row_norms(
                    matrix_of(layer, self.site),
                    self.a.flatten(1),
                    self.b.flatten(1),
                    self.site.scale,
                ),
            )
        factor, bias = self.lora_magnitude / norms, getattr(layer, "bias", None)
        if isinstance(layer, ConvNd):
            # Rows of the weight are channels of the output, behind which its positions are.
            shape = (-1, *[1] * len(layer.kernel_size))
            factor, bias = factor.reshape(shape), None if bias is None else bias.reshape(shape)
        return rescaled(output, factor, bias, entries)

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The update of the layer's output, (…, rows of the site)."""
        a, b, scale = self.a, self.b, self.site.scale
        dropout = self.dropout if self.training else 0.0
        if isinstance(layer, nn.Embedding):
            operation = plain.embedding_update(
                x,
                a,
                b,
                scale,
                dropout=dropout,
                padding=layer.padding_idx,
                by_frequency=layer.scale_grad_by_freq,
            )
            # Gemma's embedding multiplies what it looks up.
            return operation * getattr(layer, "embed_scale", 1.0)
        if isinstance(layer, ConvNd):
            x = F.dropout(x, dropout) if dropout else x
            convolve = convolution_of(layer)
            return plain.conv_update(convolve, x, a, b, scale, layer.groups)
        if torch.compiler.is_compiling():
            # A generator of our own can't be compiled.
            x = F.dropout(x, dropout) if dropout else x
            return plain.linear_update(x, a, b, scale)
        return plain.linear_update(x, a, b, scale, dropout=Dropout.drawn(dropout))

    def bias_of_layer(self) -> Tensor:
        """scale·b, (d_out of the layer,): zero beside the rows of a slice."""
        assert self.lora_bias is not None
        own = self.lora_bias * self.site.scale
        if self.site.rows is None:
            return own
        rows = positions(self.site.rows, own.device)
        return own.new_zeros(cast(int, self.site.layer_rows)).index_copy(0, rows, own)

    def factors(self, weight: float) -> fused.Factors:
        """The update of a linear layer's output in one forward pass."""
        use = fused.FactorUse(
            scale=self.site.scale * weight,
            entries=_entries(self.site.rows, self.lora_a.device),
            dropout=Dropout.drawn(self.dropout if self.training else 0.0),
        )
        return fused.Factors(self.a, self.b, use)

    def add_to(self, matrix: Tensor) -> None:
        """Add ΔW to a weight in place, (d_out, …), and give its rows their magnitudes."""
        a, b = (weight.detach().to(matrix) for weight in (self.a, self.b))
        start = 0
        for first, last in self.site.rows or ((0, matrix.shape[0]),):
            own, rows = slice(start, start + last - first), matrix[first:last]
            plain.add_delta(rows, a, b[own], self.site.scale)
            if self.lora_magnitude is not None:
                norms = self.lora_magnitude.detach()[own].to(matrix)
                rows *= of_rows(norms / plain.norms(rows.flatten(1)), rows)
            start += last - first

    def added_to(self, matrix: Tensor) -> Tensor:
        """A weight plus ΔW, (d_out, …), its rows with their magnitudes; all may take gradients."""
        a, b = (factor.flatten(1).to(matrix.dtype) for factor in (self.a, self.b))
        entries = None if self.site.rows is None else positions(self.site.rows, matrix.device)
        part = matrix if entries is None else matrix[entries]
        delta = (b @ a) * self.site.scale
        part = part + delta.reshape(part.shape)
        if self.lora_magnitude is not None:
            norms = plain.norms(part.detach().flatten(1))
            part = part * of_rows(self.lora_magnitude.to(part.dtype) / norms, part)
        return part if entries is None else matrix.index_copy(0, entries, part)


def of_rows(values: Tensor, weight: Tensor) -> Tensor:
    """A value for each row of a weight (d_out, …), to multiply it with."""
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _entries(rows: RowRanges | None, device: torch.device) -> slice | Tensor | None:
    """The entries of an output's last dimension that a site changes; None: all."""
    if rows is None:
        return None
    return slice(*rows[0]) if len(rows) == 1 else positions(rows, device)


@cache
def positions(rows: RowRanges, device: torch.device) -> Tensor:
    """The output rows of an interleaved slice, int64."""
    # What is made in inference mode could not be kept for a backward pass later.
    with torch.inference_mode(False):
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in rows])
