"""What one adapter does to one layer by LoRA: the updates of it or its slices, and its bias."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapter.site import RowRanges
from lorakit.kernels import fused
from lorakit.layers.operation import Update
from lorakit.methods.lora.lora import ConvNd, LowRank, is_linear, positions
from lorakit.models.quantized_weight import float_weight
from lorakit.upstream.private_names import own_modules


class LoRAUpdate(Update):
    """All that one adapter does to one layer: updates of it or of its slices, and its bias."""

    bias: nn.Parameter | None

    def __init__(self, parts: Mapping[str, LowRank], bias: Tensor | None = None) -> None:
        super().__init__()
        own_modules(self).update(parts)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

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
        shift = self.shift(layer)
        if shift is not None:
            shift = shift.to(output.dtype) * weight
            if isinstance(layer, ConvNd):
                shift = shift.reshape(-1, *[1] * len(layer.kernel_size))
            output = output + shift
        return output

    @property
    def has_shift(self) -> bool:
        """Whether something is added to the layer's bias, if it has one, or in its place."""
        return self.bias is not None or any(p.lora_bias is not None for p in self.low_ranks())

    def shift(self, layer: nn.Module) -> Tensor | None:
        """What is added to the output, (d_out,): the bias's change, and scale·b of each B."""
        biases = [part.bias_of_layer() for part in self.low_ranks() if part.lora_bias is not None]
        if self.bias is not None:
            biases.append(self.bias - cast(Tensor, layer.bias))
        return functools.reduce(torch.add, biases) if biases else None

    def _biased(self, bias: Tensor) -> Tensor:
        """The bias that the layer has with this update, where its own is another one."""
        biases = [part.bias_of_layer() for part in self.low_ranks() if part.lora_bias is not None]
        return functools.reduce(torch.add, biases, bias if self.bias is None else self.bias)

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
            return self._biased(weight).to(weight.dtype)
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
        return ", ".join([*texts, *(["bias"] if self.has_shift else [])])

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
        if self.has_shift:
            with torch.no_grad():
                yield "bias", self._biased(cast(Tensor, layer.bias).to(exact)).to(exact)

    def why_unmergeable(self, layer: nn.Module) -> str | None:
        """Why the layer cannot hold the update: it has no bias, and B has one."""
        if self.has_shift and layer.bias is None:
            return "the layer has no bias that could hold that of B (lora_bias)"
        return None

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what each site has, and the bias."""
        for part in self.low_ranks():
            for end, parameter in part.named_tensors():
                yield f"{part.site.name}.{end}", parameter
        if self.bias is not None:
            yield f"{path}.bias", self.bias

    def shared_tensors(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Yield A and B of tied sites."""
        for part in self.low_ranks():
            for end, values in part.shared_tensors():
                yield f"{part.site.name}.{end}", values


def _add(output: Tensor, update: Tensor, rows: RowRanges | None) -> Tensor:
    """The output with an update added, at some of its last dimension's entries only."""
    if rows is None:
        return output + update if torch.is_grad_enabled() else output.add_(update)
    if len(rows) == 1:
        output[..., rows[0][0] : rows[0][1]] += update
        return output
    return output.index_add(-1, positions(rows, output.device), update)
