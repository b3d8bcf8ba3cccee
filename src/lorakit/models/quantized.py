"""Bases with 4-bit or 8-bit weights (QLoRA, Dettmers et al. 2023): made from float ones, and back.

Norms, embeddings, biases, the output head and a task's heads keep their precision. The base's
identity is that of the float weights, so an adapter fits the quantised and the original base.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import MissingExtraError, ModelError
from lorakit.models.base import base_modules
from lorakit.models.identity import BaseIdentity, identify
from lorakit.models.linear_probe import why_no_matmul
from lorakit.models.quantized_weight import float_weight, is_quantized, own_weight
from lorakit.models.reads import giving_precision, only_read
from lorakit.models.roles import output_head, task_heads
from lorakit.upstream.private_names import (
    NonDynamicallyQuantizableLinear,
    kept_in_float32,
    own_parameters,
)
from lorakit.upstream.quiet_library import quiet_library

CARD_KEY = "quantised"
"""The training card's key for how the base was quantised."""
WAYS = ("4bit", "8bit")
"""How weights can be quantised."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The quantisation of a base: the form in which it holds weights, and its settings."""

    bits: int
    """4 or 8."""
    type: str
    """nf4: blocks of 64 weights (QLoRA, section 3); int8: rows of the matrix."""
    double: bool
    """Whether the scales of nf4 are quantised themselves, to 8 bits: 0.37 bits a weight less."""
    dtype: str
    """Precision of the weights that were quantised, and of those that are not."""

    @staticmethod
    def of(way: str, dtype: str, *, double: bool = True) -> Quantization:
        """The quantisation that a word of `WAYS` stands for, of weights in `dtype`."""
        four = way == "4bit"
        kind = "nf4" if four else "int8"
        return Quantization(bits=4 if four else 8, type=kind, double=four and double, dtype=dtype)

    def __str__(self) -> str:
        """The quantisation in words, such as "8-bit int8 of float32"."""
        double = ", scales quantised too" if self.double else ""
        return f"{self.bits}-bit {self.type} of {self.dtype}{double}"


def check_library(purpose: str = "a quantised base") -> None:
    """Make sure that bitsandbytes is installed.

    Args:
        purpose: what needs it, for the message.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(purpose, "quantized")


def quantize(model: nn.Module, how: Quantization) -> None:
    """Quantise the weights of a model's linear layers, in place; the float weights are dropped.

    Each Linear and Conv1D is replaced but for the output head, the heads of a task, layers with a
    weight that is tied to another, that transformers wants in float32, that the model reads by
    itself or whose precision it asks for, and subclasses of Linear with arithmetic of their own.
    Biases stay the same objects.

    Args:
        model: a plain base, on any device.
        how: to what. Weights are rounded to `how.dtype` first.

    Raises:
        ModelError: nothing can be quantised, something is already, or adapters are attached.
        MissingExtraError: bitsandbytes is not installed.
    """
    check_library()
    chosen = dict(_quantizable(model))
    _check_plain(model)
    if how.type not in ("nf4", "int8"):
        raise ModelError(f"weights cannot be quantised as {how}: there are nf4 and int8")
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has nothing to quantise: no Linear or Conv1D beside its heads"
        )
    original = identify(model, skip=task_heads(model))
    _replace(model, chosen, how)
    model._lorakit_original = original  # type: ignore[assignment]


def quantize_without_weights(model: nn.Module, how: Quantization) -> None:
    """Give a model on the meta device the layers that `quantize` would make, without weights too.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    check_library()
    _replace(model, dict(_quantizable(model)), how)


def _replace(model: nn.Module, chosen: Mapping[str, nn.Module], how: Quantization) -> None:
    with quiet_library():
        from lorakit.models.quantized_layers import quantized_layer
    for path, layer in chosen.items():
        model.set_submodule(path, quantized_layer(layer, how.bits, how.double, how.dtype))


def base_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield all that a base holds in memory: parameters, buffers, scales of quantised weights."""
    yield from model.parameters()
    yield from model.buffers()
    for _, layer in base_modules(model):
        if is_quantized(layer):
            weight: Any = layer.weight
            state = getattr(weight, "quant_state", None)
            nested = getattr(state, "state2", None)
            scales = [getattr(each, "absmax", None) for each in (state, nested)]
            found = (*scales, getattr(weight, "SCB", None))
            yield from (each for each in found if each is not None)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace a model's quantised layers, in place, by float layers with the dequantised weights.

    Raises:
        ModelError: adapters are attached.
    """
    if hasattr(model, "_lorakit"):
        raise ModelError("adapters are attached: detach them, dequantise, and attach them again")
    for path, layer in list(base_modules(model)):
        if is_quantized(layer):
            model.set_submodule(path, _float_layer(layer, dtype))


def convert_quantized(model: nn.Module) -> None:
    """Convert the layers of a checkpoint that bitsandbytes quantised to lorakit's, in place.

    The weights before quantisation are not known, so they are no part of the base's identity.
    """
    if quantized_within(model) is None:
        return
    from lorakit.models.quantized_layers import convert_layer

    for _, layer in base_modules(model):
        if is_quantized(layer):
            convert_layer(layer)
    drop_quantisation_mark(model)


def drop_quantisation_mark(model: nn.Module) -> None:
    """Remove transformers' marks of a model whose weights came from a quantised file.

    With them it refuses to train, and saves in a form that only it can read.
    """
    vars(model.config).pop("quantization_config", None)
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        vars(model).pop(mark, None)


def original_identity(model: nn.Module) -> BaseIdentity | None:
    """The identity that a model had before `quantize`, or None if it was not called."""
    return cast("BaseIdentity | None", getattr(model, "_lorakit_original", None))


def quantization_of(model: nn.Module) -> Quantization | None:
    """The quantisation of a model's weights, or None where they are not quantised."""
    layers = (layer for _, layer in base_modules(model) if is_quantized(layer))
    first: Any = next(layers, None)
    if first is None:
        return None
    dtype = str(float_weight(first).dtype).removeprefix("torch.")
    state = getattr(own_weight(first), "quant_state", None)
    if state is None:
        return Quantization.of("8bit", dtype)
    return replace(Quantization.of("4bit", dtype, double=state.nested), type=state.quant_type)


def card_of_base(model: nn.Module) -> dict[str, Any]:
    """The entries of a training card about a base: its quantisation, or none."""
    found = quantization_of(model)
    return {} if found is None else {CARD_KEY: asdict(found)}


def quantization_on(card: Mapping[str, Any]) -> Quantization | None:
    """The base's quantisation in training, from a training card; None: it was not quantised.

    Raises:
        ModelError: the card has an entry that this version does not know.
    """
    said = card.get(CARD_KEY)
    if said is None:
        return None
    try:
        return Quantization(**said)
    except TypeError as error:
        raise ModelError(f"the training card has an unknown kind of base: {said}") from error


def _quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of each layer that `quantize` replaces."""
    left = [*task_heads(model), *kept_in_float32(model)]
    inside = tuple(f".{name}." for name in left)
    head = output_head(model)
    holders: dict[int, int] = {}
    for _, module in base_modules(model):
        for parameter in own_parameters(module).values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    left_alone = only_read(model) | giving_precision(model)
    for path, module in base_modules(model):
        own = _is_matmul(module) and path not in left_alone
        alone = own and module is not head and holders[id(module.weight)] == 1
        if alone and path and not any(name in f".{path}." for name in inside):
            yield path, module


def _is_matmul(module: nn.Module) -> bool:
    """Whether a layer can be replaced by another that multiplies with the same weight."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        # Of nn.MultiheadAttention, which reads its weight.
        return False
    if type(module) is nn.Linear or isinstance(module, Conv1D):
        return True
    return isinstance(module, nn.Linear) and why_no_matmul(module) is None


def _check_plain(model: nn.Module) -> None:
    problem = ""
    if hasattr(model, "_lorakit"):
        problem = "adapters are attached: quantise the base first"
    elif any(is_quantized(layer) for _, layer in base_modules(model)):
        problem = "its weights are quantised already"
    elif hasattr(model, "_lorakit_loftq"):
        problem = "LoftQ has changed its weights for an adapter: load the base anew"
    elif any(parameter.is_meta for parameter in model.parameters()):
        problem = "its weights are on the meta device"
    if problem:
        raise ModelError(f"{type(model).__name__} cannot be quantised: {problem}")


def _float_layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A layer of the class that was quantised, with a float weight and the same bias."""
    quantised: Any = layer
    weight = float_weight(layer).to(dtype)
    with torch.device("meta"):
        made: Any = nn.Linear(1, 1, bias=False)
    if getattr(quantised, "source_cls", nn.Linear) is Conv1D:
        made = Conv1D(weight.shape[0], 1)
        made.nx, weight = weight.shape[1], weight.T.contiguous()
    else:
        made.in_features, made.out_features = quantised.in_features, quantised.out_features
        made.__class__ = getattr(quantised, "source_cls", nn.Linear)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), quantised.bias
    return cast(nn.Module, made.train(layer.training))


def quantized_within(module: nn.Module) -> str | None:
    """The path of a quantised layer in a module, or None where there is none."""
    return next((path for path, layer in base_modules(module) if is_quantized(layer)), None)
