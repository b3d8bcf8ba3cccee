"""Linear layers with weights in 4 or 8 bits: stored by bitsandbytes, multiplied by plain torch.

They are bitsandbytes' layers with another `forward`. On a CPU bitsandbytes' forward pass repacks
the weight in inference and rounds its scales; in 8 bits it also rounds the inputs, unless the layer
is in training mode. Then the model that is evaluated is not the one that was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from bitsandbytes.nn import modules as bnb
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lorakit.errors import ModelError
from lorakit.models.base import base_parameter
from lorakit.upstream.private_names import reshaped_result

BLOCK = 64
"""Weights that share one scale in 4 bits (QLoRA, section 2)."""


class _Matmul(Function):
    """W·x + b with a frozen quantised W, which the backward pass dequantises again, not saves.

    Shapes: x (…, d_in), the output (…, d_out), bias (d_out,).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        weight = dequantized(layer).to(x.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        output = F.linear(tokens, weight, None if bias is None else bias.to(x.dtype))
        # No view for autograd, since adapters add to the layer's output in place.
        return reshaped_result(output, [*x.shape[:-1], output.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_x, for_bias, _ = ctx.needs_input_grad
        of_x = grad @ dequantized(ctx.layer).to(grad.dtype) if for_x else None
        return of_x, grad.flatten(0, -2).sum(0) if for_bias else None, None


class Linear4bit(bnb.Linear4bit):
    """A linear layer whose weight is in 4 bits."""

    weight: Any

    def forward(self, x: Tensor) -> Tensor:
        """W·x + b in the precision of x."""
        return cast(Tensor, _Matmul.apply(x, self.bias, self))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear4bit:
        super()._apply(fn, recurse)
        self.weight.quant_state.to(self.weight.device)
        return self


class Linear8bit(bnb.Linear8bitLt):
    """A linear layer whose weight is in 8 bits, with one scale for each row."""

    weight: Any
    float_dtype = torch.float32
    """Precision of the weight that was quantised, where that is known."""

    def forward(self, x: Tensor) -> Tensor:
        """W·x + b in the precision of x."""
        return cast(Tensor, _Matmul.apply(x, self.bias, self))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear8bit:
        super()._apply(fn, recurse)
        self.weight.SCB = self.weight.SCB.to(self.weight.device)
        return self


def quantized_layer(layer: nn.Module, bits: int, double: bool, dtype: str) -> nn.Module:
    """A quantised layer that replaces a Linear or Conv1D, with the same bias.

    Args:
        layer: what to quantise.
        bits: 4 or 8.
        double: quantise the scales of 4 bits too.
        dtype: precision to which the weight is rounded first.
    """
    source: Any = layer
    transposed = isinstance(layer, Conv1D)
    weight = source.weight.detach().to(getattr(torch, dtype))
    weight = (weight.T if transposed else weight).contiguous()
    if weight.dtype == torch.float64:
        weight = weight.float()
    made: Any = _four_bits(weight, double) if bits == 4 else _eight_bits(weight)
    made.bias = source.bias
    made.source_cls = Conv1D if transposed else type(layer)
    return cast(nn.Module, made.train(layer.training))


def _four_bits(weight: Tensor, double: bool) -> Linear4bit:
    d_out, d_in = weight.shape
    made = Linear4bit(d_in, d_out, bias=False, device="meta", quant_type="nf4")
    packed, state = quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    made.weight = bnb.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=double,
        quant_type="nf4",
        bnb_quantized=True,
    )
    return made


def _eight_bits(weight: Tensor) -> Linear8bit:
    d_out, d_in = weight.shape
    made = Linear8bit(d_in, d_out, bias=False, has_fp16_weights=False, device="meta")
    rows, scales, _ = int8_vectorwise_quant(weight.half())
    made.weight = bnb.Int8Params(rows, requires_grad=False, SCB=scales)
    made.float_dtype = weight.dtype
    return made


def convert_layer(layer: nn.Module) -> None:
    """Turn a quantised layer of bitsandbytes into one of this module, in place."""
    if isinstance(layer, bnb.Linear4bit):
        layer.__class__ = Linear4bit
    else:
        layer.__class__ = Linear8bit


def dequantized(layer: nn.Module) -> Tensor:
    """The dequantised weight of a layer, (d_out, d_in), in the precision that it had before.

    Raises:
        ModelError: bitsandbytes has packed the weight for inference.
    """
    held: Any = layer
    weight: Any = base_parameter(layer, "weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        scales = held.state.SCB if weight.SCB is None else weight.SCB
        rows = weight.detach() * (scales / 127).unsqueeze(1)
        return cast(Tensor, rows.to(getattr(held, "float_dtype", rows.dtype)))
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "bitsandbytes has packed the quantised weights for inference, with scales rounded: "
            "load the base anew, by lorakit's load_model(…, quantize=…)"
        )
    return _four_bits_as_floats(weight.detach(), state)


def after_quantising(matrix: Tensor, bits: int) -> Tensor:
    """What is left of a float32 matrix after it was quantised, in float32.

    By the operations of PEFT's LoftQ, so that it is that in every bit: in 4 bits nf4, whose scales
    are not quantised; in 8 bits int8 by rows, from float16.
    """
    if bits == 8:
        rows, scales, _ = int8_vectorwise_quant(matrix.half())
        return int8_vectorwise_dequant(rows, scales)
    packed, state = quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return _four_bits_as_floats(packed, state)


def _four_bits_as_floats(packed: Tensor, state: Any) -> Tensor:
    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(packed, state)
    # On CPUs bitsandbytes 0.50.2 takes wrong scales where a block ends inside a row. So the weight
    # is dequantised as rows of one block each, or as a single row.
    as_blocks = copy.copy(state)
    size = state.shape.numel()
    whole = size % state.blocksize == 0
    as_blocks.shape = torch.Size([size // state.blocksize, state.blocksize] if whole else [size])
    return dequantize_4bit(packed, as_blocks).view(state.shape)
