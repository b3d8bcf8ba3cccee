"""LoRA: h = W₀x + scale·B·A·x with A and B trained (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapter.site import LayerKind, RowRanges, Site
from lorakit.config.methods import LoRAConfig
from lorakit.kernels import fused, plain
from lorakit.kernels.dropout import Dropout
from lorakit.layers.operation import Update
from lorakit.methods.lora.dora import RowNorms, rescaled
from lorakit.models.base import base_parameter
from lorakit.models.experts import ExpertMatrices, expert_matrices
from lorakit.models.linear_probe import own_class, why_no_matmul
from lorakit.models.quantized_weight import float_weight, is_quantized
from lorakit.upstream.private_names import (
    NonDynamicallyQuantizableLinear,
    convolution_of,
    own_modules,
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
    d_out, d_in = matrix_shape(layer)
    if site.rows is not None:
        d_out = sum(stop - start for start, stop in site.rows)
    return (site.rank, d_in), (d_out, site.rank)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a layer's weight seen as a matrix."""
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
    return "transposed" if isinstance(layer, Conv1D) else "linear"


def kind_of_experts(matrices: ExpertMatrices) -> LayerKind:
    """The form in which a parameter holds the matrices of experts."""
    return "experts-transposed" if matrices.transposed else "experts"


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a matmul with its weight."""
    return isinstance(layer, nn.Linear | Conv1D)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether LoRA knows what this layer computes from its weight."""
    return why_not_adaptable(layer) is None


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Why LoRA has no update for a layer; None: it has."""
    kinds = (nn.Linear, Conv1D, nn.Embedding, *ConvNd)
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    own = own_class(layer)
    if kind is None:
        return "it is no matmul, convolution or embedding"
    if own is NonDynamicallyQuantizableLinear:
        return "MultiheadAttention reads its weight and never calls it"
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


ENDS = ("lora_a", "lora_b", "lora_magnitude", "frozen_a", "frozen_b")
"""The last parts of the names of a site's tensors in a model; the first two are always there."""


class LowRank(nn.Module):
    """A and B of one site, with frozen factors (PiSSA) and the magnitudes of its rows (DoRA)."""

    site: Site
    dropout: float
    freezes_a: bool
    norms: RowNorms
    lora_a: nn.Parameter
    lora_b: nn.Parameter
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

    def let_train(self) -> None:
        """Let the tensors that the settings train take gradients."""
        self.lora_a.requires_grad_(not self.freezes_a)
        self.lora_b.requires_grad_()
        if self.lora_magnitude is not None:
            self.lora_magnitude.requires_grad_()

    def rescaled(self, layer: nn.Module, output: Tensor) -> Tensor:
        """W·x + bias, where the rows of W have the trained magnitudes."""
        assert self.lora_magnitude is not None
        entries = None if self.site.rows is None else positions(self.site.rows, output.device)
        with torch.no_grad():
            weight = cast(Tensor, layer.weight)
            norms = self.norms.of(
                [weight, *self.parameters()],
                lambda: plain.row_norms(
                    matrix_of(layer, self.site), self.a, self.b, self.site.scale
                ),
            )
        factor = self.lora_magnitude / norms
        return rescaled(output, factor, cast("Tensor | None", layer.bias), entries)

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
                rows *= (norms / plain.norms(rows))[:, None]
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
            part = part * (self.lora_magnitude.to(part.dtype) / norms)[:, None]
        return part if entries is None else matrix.index_copy(0, entries, part)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class LoRAUpdate(Update):
    """All that one adapter does to one layer: updates of it or of its slices, and its bias."""

    bias: nn.Parameter | None

    def __init__(self, parts: Mapping[str, LowRank], bias: Tensor | None = None) -> None:
        super().__init__()
        own_modules(self).update(parts)
        self.bias = None if bias is None else _frozen(bias)

    @property
    def parts(self) -> Mapping[str, LowRank]:
        """The updates by role, or by "whole" for the layer: the children of this module."""
        return cast(Mapping[str, LowRank], own_modules(self))

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output + scale·B·A·x, with DoRA's magnitudes and the trained bias."""
        return self._changed(layer, inputs[0], output, 1.0)

    def added(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Tensor,
        *,
        weight: float,
        base: Tensor,
    ) -> Tensor:
        """The output + weight·scale·B·A·x, and weight times the change of the bias."""
        if self.is_additive:
            return self._changed(layer, inputs[0], output, weight)
        return super().added(layer, inputs, output, weight=weight, base=base)

    def _changed(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        """The output with the update; magnitudes are applied before the bias is changed."""
        output = self._with_delta(layer, x, output, weight)
        for part in self.low_ranks():
            if part.lora_magnitude is not None:
                output = part.rescaled(layer, output)
        if self.bias is not None:
            shift = (self.bias - cast(Tensor, layer.bias)).to(output.dtype) * weight
            if isinstance(layer, ConvNd):
                shift = shift.reshape(-1, *[1] * len(layer.kernel_size))
            output = output + shift
        return output

    def _with_delta(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        """The output + weight·scale·B·A·x."""
        if self.parts and is_linear(layer) and fused.available(x, training=self.training):
            factors = self.factors(weight)
            everywhere = fused.Span(0, x.shape[:-1].numel(), tuple(range(len(factors))))
            return fused.add_updates(output, x, factors, [everywhere])
        for part in self.low_ranks():
            update = part(layer, x)
            update = update if weight == 1 else update * weight
            output = _add(output, update.to(output.dtype), part.site.rows)
        return output

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The weight plus ΔW, or the trained bias, in the precision of the base's."""
        if inside:
            return weight
        if name == "bias":
            return weight if self.bias is None else self.bias.to(weight.dtype)
        return self._weight(weight, torch.promote_types(weight.dtype, torch.float32)).to(weight)

    def _weight(self, weight: Tensor, exact: torch.dtype) -> Tensor:
        """The weight of a layer plus ΔW, in another precision; A and B may take gradients."""
        if not self.parts:
            return weight
        embeds_or_turned = any(p.site.kind in ("embedding", "transposed") for p in self.low_ranks())
        matrix = weight.to(exact)
        matrix = matrix.T if embeds_or_turned else matrix
        for part in self.low_ranks():
            matrix = part.added_to(matrix)
        return matrix.T if embeds_or_turned else matrix

    def join(self, other: LoRAUpdate) -> None:
        """Take over what another update of the same adapter does to the layer."""
        own_modules(self).update(other.parts)
        if other.bias is not None:
            self.bias = other.bias

    @property
    def summary(self) -> str:
        """The rank and scale of each of its updates, for `print(model)`."""
        texts = [
            f"{f'{part.site.role} ' if part.site.rows else ''}rank {part.site.rank}, "
            f"scale {part.site.scale:g}"
            for part in self.low_ranks()
        ]
        return ", ".join([*texts, *([] if self.bias is None else ["bias"])])

    @property
    def is_additive(self) -> bool:
        """Whether the update only adds B·A·x and a bias to what the layer computes."""
        return all(part.lora_magnitude is None for part in self.low_ranks())

    def let_train(self) -> None:
        """Let the tensors that the settings train, and the bias, take gradients."""
        for part in self.low_ranks():
            part.let_train()
        if self.bias is not None:
            self.bias.requires_grad_()

    def low_ranks(self) -> Iterator[LowRank]:
        """Yield A and B of the layer, or of each of its slices."""
        return iter(self.parts.values())

    def factors(self, weight: float) -> list[fused.Factors]:
        """The updates of a linear layer's output in one forward pass."""
        return [part.factors(weight) for part in self.low_ranks()]

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the weight plus ΔW, and the trained bias."""
        if self.parts:
            weight = float_weight(layer).detach().to(exact, copy=True)
            matrix = weight.T if isinstance(layer, Conv1D | nn.Embedding) else weight
            for part in self.low_ranks():
                part.add_to(matrix)
            yield "weight", weight
        if self.bias is not None:
            yield "bias", self.bias.detach().to(exact)

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what each site has, and the bias."""
        for part in self.low_ranks():
            for end, parameter in part.named_parameters():
                yield f"{part.site.name}.{end}", parameter
        if self.bias is not None:
            yield f"{path}.bias", self.bias


def _add(output: Tensor, update: Tensor, rows: RowRanges | None) -> Tensor:
    """The output with an update added, at some of its last dimension's entries only."""
    if rows is None:
        return output + update if torch.is_grad_enabled() else output.add_(update)
    if len(rows) == 1:
        output[..., rows[0][0] : rows[0][1]] += update
        return output
    return output.index_add(-1, positions(rows, output.device), update)


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
