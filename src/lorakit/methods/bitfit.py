"""BitFit: the bias vectors alone are trained (Ben Zaken et al. 2021; LoRA paper, section 5.1)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.config.base import dtype_name
from lorakit.config.methods import BitFitConfig, MethodConfig
from lorakit.errors import TargetError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Update
from lorakit.methods.component import Component, Materials, Shape
from lorakit.methods.lora.lora import ConvNd, is_linear, matrix_shape
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.methods.uncalled import uncalled_component
from lorakit.models.base import base_modules, device_of
from lorakit.models.families import family_name, uncalled_weights
from lorakit.models.paths import block_number
from lorakit.models.roles import task_heads
from lorakit.upstream.private_names import own_parameters

BIASED = (nn.Linear, nn.LayerNorm, *ConvNd)
BIASED_BY_NAME = ("Conv1D", "DebertaLayerNorm")
"""Classes of transformers, where importing them would load a model's code."""


def components(model: nn.Module, config: BitFitConfig) -> tuple[Component, ...]:
    """What BitFit trains of a model: all biases, and by `add_missing` new ones.

    Raises:
        TargetError: the model has no biases, or one of another kind than is known.
    """
    others: list[Component] = []
    for path, names in uncalled_weights(model).items():
        biases = tuple(name for name in names if name.endswith("bias"))
        if biases:
            module, method = model.get_submodule(path), config.method
            others.append(
                uncalled_component(
                    module, path, biases, method=method, dtype=dtype_name(config.dtype)
                )
            )
    if config.add_missing:
        others += [
            AddedBias(path=path, method=config.method, size=size, dtype=dtype_name(config.dtype))
            for path, size in _without_bias(model).items()
        ]
    paths = _biased(model)
    if not others and not _pre_trained(model, paths):
        advice = (
            "and no linear layer in a numbered block to give one to"
            if config.add_missing
            else "bitfit.add_missing gives the linear layers of its blocks one that starts at zero"
        )
        raise TargetError(f"BitFit trains biases, and {family_name(model)} has none: {advice}")
    return (*(trained_bias(model.get_submodule(path), path, config) for path in paths), *others)


def _pre_trained(model: nn.Module, paths: Collection[str]) -> list[str]:
    """The paths that lie in no head of a task, which is trained anyway."""
    heads = task_heads(model)
    return [path for path in paths if path.partition(".")[0] not in heads]


def bias_paths(model: nn.Module, *, only: Collection[str] | None = None) -> tuple[str, ...]:
    """The paths of the modules whose bias LoRA can train as well.

    Args:
        model: the base.
        only: paths to look at; None: all.

    Raises:
        TargetError: there is none, or one of another kind than is known.
    """
    paths = _biased(model, only=only)
    if not (_pre_trained(model, paths) if only is None else paths):
        raise TargetError(
            "biases are to be trained, but none of the layers has one: use bias='none'"
        )
    return paths


def _biased(model: nn.Module, *, only: Collection[str] | None = None) -> tuple[str, ...]:
    named = {
        path: module
        for path, module in base_modules(model)
        if isinstance(own_parameters(module).get("bias"), nn.Parameter)
        and (only is None or path in only)
    }
    known = {id(module.bias) for module in named.values() if adds_bias(module)}
    # BERT's head for words holds the bias of its last layer once more.
    odd = {
        path: module
        for path, module in named.items()
        if not adds_bias(module) and id(module.bias) not in known
    }
    if odd:
        lines = [f"{path} ({type(module).__name__})" for path, module in odd.items()]
        raise TargetError.listing(
            "some biases are of layers that do more than add them, so they can't be trained; "
            "modules_to_save can train such a layer in full",
            lines,
        )
    return tuple(path for path, module in named.items() if adds_bias(module))


def adds_bias(module: nn.Module) -> bool:
    """Whether a module's output is its matmul, convolution or norm plus its bias."""
    own = module.own_class if isinstance(module, AdaptedLayer) else type(module)
    return isinstance(module, BIASED) or own.__name__ in BIASED_BY_NAME


def _without_bias(model: nn.Module) -> dict[str, int]:
    """The linear layers inside blocks that have no bias, with their output widths.

    Embeddings and output heads lie outside of all blocks.
    """
    heads = task_heads(model)
    return {
        path: matrix_shape(module)[0]
        for path, module in base_modules(model)
        if is_linear(module)
        and own_parameters(module).get("bias") is None
        and block_number(path) is not None
        and path.partition(".")[0] not in heads
    }


class AddedBiasUpdate(Update):
    """A trained bias of a layer that has none."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output + bias."""
        return output + self.bias.to(output.dtype)

    def added(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Tensor,
        *,
        weight: float,
        base: Tensor,
    ) -> Tensor:
        """The output + weight·bias."""
        return output + (self.bias * weight).to(output.dtype)

    def why_unmergeable(self, layer: nn.Module) -> str:
        """The reason: a checkpoint of the architecture has no parameter for an added bias."""
        return "the layer has no bias that could hold the added one"

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing."""
        yield from ()

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the bias, under a name that no parameter of the base has."""
        yield f"{path}.added_bias", self.bias


@dataclass(frozen=True, kw_only=True)
class AddedBias(Component):
    """A bias for a linear layer that has none; it starts at zero."""

    size: int
    """Output width of the layer."""
    dtype: str
    """Precision of the bias."""

    what = "added bias"

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """(d_out,)."""
        return {f"{self.path}.added_bias": (self.size,)}

    def update(self, materials: Materials) -> AddedBiasUpdate:
        """The update of the layer."""
        device, dtype = device_of(materials.modules[self.path]), getattr(torch, self.dtype)
        (name,) = self.shapes
        made = materials.tensor(name, device, lambda: torch.zeros(self.size, dtype=dtype))
        return AddedBiasUpdate(made)


@dataclass(frozen=True, kw_only=True)
class TrainedBias(Component):
    """A trained value of a bias that a layer of the base has."""

    size: Shape
    dtype: str
    """Precision of a fresh start."""

    step = 1
    what = "bias"
    reads_base = True

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The bias's shape; its name is that of the base's parameter."""
        return {f"{self.path}.bias": self.size}

    def update(self, materials: Materials) -> LoRAUpdate:
        """The update of the layer, whose fresh bias is the base's own."""
        layer, dtype = materials.modules[self.path], getattr(torch, self.dtype)
        (name,) = self.shapes
        bias = materials.tensor(
            name, device_of(layer), lambda: cast(Tensor, layer.bias).detach().to(dtype)
        )
        return LoRAUpdate({}, bias)

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of the match table, where biases of all sizes are one row."""
        return self.path, self.what, "", "", ""


def trained_bias(layer: nn.Module, path: str, config: MethodConfig) -> TrainedBias:
    """The component that trains the bias of a layer."""
    size = tuple(cast(Tensor, layer.bias).shape)
    return TrainedBias(path=path, method=config.method, size=size, dtype=dtype_name(config.dtype))
