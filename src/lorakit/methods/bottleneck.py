"""Adapter layers: bottlenecks behind layers of the base (section 5.1)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.config.base import dtype_name
from lorakit.config.block_ranges import layer_numbers
from lorakit.config.methods import Activation, BottleneckConfig
from lorakit.errors import TargetError
from lorakit.kernels.dropout import Dropout
from lorakit.layers.operation import Update
from lorakit.methods.component import Component, Materials, Shape
from lorakit.methods.module_copy import trained_copy
from lorakit.models.base import base_modules, base_parameters, device_of
from lorakit.models.blocks import OUTPUTS, Block, blocks, named_modules

SIZES = {"h": 16, "l": 32, "p": 32, "d": 48}
"""Inner width of each variant, where the settings have none: 32 for each block, in two halves for
h; d has fewer blocks. Saved adapters rely on these numbers."""
OUTPUT_ROLES = {"h": ("o", "down"), "l": (), "p": ("down",), "d": ("down",)}
"""Which outputs of a block each variant changes; l: the block's own."""
DROPPED = 5, 12
"""Share of the blocks that adapter-d leaves out by itself (Rücklé 2020 drops 5 of 12)."""
ELSEWHERE = "name the modules whose output goes through a bottleneck in bottleneck.at"


def components(model: nn.Module, config: BottleneckConfig) -> tuple[Component, ...]:
    """The bottlenecks of a model, and the norms that are trained beside them.

    Raises:
        TargetError: the modules cannot be found, or a bottleneck would be wider than its layer.
    """
    adapted = () if config.at else _adapted_blocks(model, config)
    if config.at:
        paths = named_modules(model, config.at, what="bottleneck.at")
    else:
        paths = tuple(path for block in adapted for path in _outputs(block, config))
    widths = {path: _width(model, path) for path in paths}
    _check_widths(widths, config.size)
    norms = _norms(model, adapted) if config.train_norms else ()
    return (
        *(
            trained_copy(model, path, config.method, dtype=dtype_name(config.dtype))
            for path in norms
        ),
        *(_component(path, cast(int, widths[path]), config) for path in paths),
    )


def _adapted_blocks(model: nn.Module, config: BottleneckConfig) -> tuple[Block, ...]:
    """The blocks that get bottlenecks.

    Raises:
        TargetError: they are not known, not there, or lack an output.
    """
    try:
        found = blocks(model)
    except TargetError as error:
        raise TargetError(f"{error}: {ELSEWHERE}") from None
    depths = Counter(block.stack for block in found)
    lowest = {stack: _left_out(config, depth) for stack, depth in depths.items()}
    numbers = None if config.layers is None else layer_numbers(config.layers)
    kept = tuple(
        block
        for block in found
        if block.number >= lowest[block.stack] and (numbers is None or block.number in numbers)
    )
    problems = [
        f"dropped {count} leaves none of the {depths[stack]} blocks of {stack}"
        for stack, count in lowest.items()
        if count >= depths[stack]
    ]
    if numbers is not None and max(numbers) >= max(depths.values()):
        problems.append(
            f"layers {config.layers!r} goes up to block {max(numbers)}, but there are "
            f"{max(depths.values())} blocks, counted from 0"
        )
    if not kept and not problems:
        problems.append(f"layers {config.layers!r} are all among the lowest blocks, left out here")
    problems += _lacking(kept, config)
    if problems:
        raise TargetError.listing(f"{config.method} has no place in this model", problems)
    return kept


def _left_out(config: BottleneckConfig, depth: int) -> int:
    """The number of lowest blocks of a stack that have no bottleneck."""
    if config.variant != "d":
        return 0
    return DROPPED[0] * depth // DROPPED[1] if config.dropped is None else config.dropped


def _lacking(adapted: Sequence[Block], config: BottleneckConfig) -> Iterator[str]:
    """Yield what is wrong with blocks in which an output cannot be found."""
    for role in OUTPUT_ROLES[config.variant]:
        without = [block.path for block in adapted if not block.paths(role)]
        if without:
            yield f"no {OUTPUTS[role]} ({role}) is known in {', '.join(without)}: {ELSEWHERE}"


def _outputs(block: Block, config: BottleneckConfig) -> tuple[str, ...]:
    """The paths of the modules of one block that get a bottleneck, in module order."""
    roles = OUTPUT_ROLES[config.variant]
    return tuple(path for role, path in block.outputs if role in roles) if roles else (block.path,)


def _width(model: nn.Module, path: str) -> int | None:
    """The size of the last dimension of a module's output; None: it cannot be told."""
    module = model.get_submodule(path)
    # Linear and Conv1D say it themselves; all else is taken to put out hidden states.
    own = getattr(module, "out_features", getattr(module, "nf", None))
    return getattr(getattr(model, "config", None), "hidden_size", None) if own is None else own


def _check_widths(widths: Mapping[str, int | None], size: int | None) -> None:
    """Refuse modules of unknown width, and a bottleneck that is wider than what it narrows.

    Raises:
        TargetError: there are such; the first module of each width is named.
    """
    first: dict[int | None, str] = {}
    for path, width in widths.items():
        first.setdefault(width, path)
    problems = [
        f"how wide the output of {path} is cannot be told: name a linear layer"
        for width, path in first.items()
        if width is None
    ]
    problems += [
        f"size {size} is wider than the output of {path}, which has {width} values: use less"
        for width, path in first.items()
        if width is not None and size is not None and size > width
    ]
    if problems:
        raise TargetError.listing("bottlenecks do not fit this model", problems)


def _norms(model: nn.Module, adapted: Sequence[Block]) -> tuple[str, ...]:
    """The paths of the norms inside blocks, by the ends of their classes' names."""
    return tuple(
        f"{block.path}.{path}"
        for block in adapted
        for path, module in base_modules(model.get_submodule(block.path))
        if type(module).__name__.endswith("Norm") and any(base_parameters(module))
    )


def _component(path: str, width: int, config: BottleneckConfig) -> BottleneckComponent:
    """One bottleneck, with the variant's own settings where the user gave none."""
    variant = config.variant
    return BottleneckComponent(
        path=path,
        method=config.method,
        width=width,
        size=min(SIZES[variant], width) if config.size is None else config.size,
        activation=config.activation or ("gelu" if variant == "h" else "relu"),
        layer_norm=(variant == "l") if config.layer_norm is None else config.layer_norm,
        dropout=config.dropout,
        dtype=dtype_name(config.dtype),
    )


@dataclass(frozen=True, kw_only=True)
class BottleneckComponent(Component):
    """A bottleneck behind one module."""

    width: int
    """Values d of one position of the module's output."""
    size: int
    """Inner width r."""
    activation: Activation
    layer_norm: bool
    """Whether it has a LayerNorm for what it reads."""
    dropout: float
    """Chance that an element of the inner width is dropped in training."""
    dtype: str
    """Precision of a fresh start."""

    what = "bottleneck"

    @cached_property
    def _shapes_inside(self) -> dict[str, Shape]:
        narrow, wide = (self.size,), (self.width,)
        norm = {"norm.weight": wide, "norm.bias": wide} if self.layer_norm else {}
        down = {"down.weight": narrow + wide, "down.bias": narrow}
        return norm | down | {"up.weight": wide + narrow, "up.bias": wide}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of each trained tensor: 2·d·r + r + d values, and 2·d of a norm."""
        inside = self._shapes_inside.items()
        return {f"{self.path}.bottleneck.{name}": shape for name, shape in inside}

    def update(self, materials: Materials) -> Bottleneck:
        """The bottleneck; a fresh one changes nothing."""
        modules = materials.modules
        # A dropout, say, has no parameters; its model has.
        near = self.path if any(True for _ in base_parameters(modules[self.path])) else ""
        device = device_of(modules[near])
        own = {
            inside: materials.tensor(name, device, partial(self._fresh, inside, device))
            for name, inside in zip(self.shapes, self._shapes_inside, strict=True)
        }
        return Bottleneck(self, own)

    def _fresh(self, name: str, device: torch.device) -> Tensor:
        """The fresh values of a tensor: down random as LoRA's A (±1/√d), the norm 1, all else 0."""
        values = torch.zeros(
            self._shapes_inside[name], device="meta" if device.type == "meta" else "cpu"
        )
        if name == "down.weight":
            bound = 1 / math.sqrt(self.width)
            nn.init.uniform_(values, -bound, bound)
        elif name == "norm.weight":
            nn.init.ones_(values)
        return values.to(device, getattr(torch, self.dtype))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(Update):
    """h + up(activation(down(norm(h)))), with h a module's output; norm only where asked for."""

    def __init__(self, component: BottleneckComponent, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        # On the meta device: the given tensors replace what torch would draw.
        self.norm = nn.LayerNorm(component.width, device="meta") if component.layer_norm else None
        self.down = nn.Linear(component.width, component.size, device="meta")
        self.up = nn.Linear(component.size, component.width, device="meta")
        self.activation = component.activation
        self.dropout = component.dropout
        for name, values in tensors.items():
            owner, _, leaf = name.partition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
        self.eval()

    def forward(self, h: Tensor) -> Tensor:
        """The update of h (…, d), in the precision of the bottleneck's weights."""
        x = h.to(self.down.weight.dtype)
        if self.norm is not None:
            x = self.norm(x)
        inner = self._dropped(_ACTIVATIONS[self.activation](self.down(x)))
        return cast(Tensor, self.up(inner))

    def _dropped(self, inner: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return inner
        if torch.compiler.is_compiling():
            # A generator of our own can't be compiled.
            return F.dropout(inner, self.dropout)
        drawn = Dropout.drawn(self.dropout)
        return inner if drawn is None else drawn.of(inner)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output + bottleneck(output), as a new tensor."""
        return output + self(output).to(output.dtype)

    def added(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Tensor,
        *,
        weight: float,
        base: Tensor,
    ) -> Tensor:
        """The output + weight·bottleneck(base), as a new tensor."""
        return output + (self(base) * weight).to(output.dtype)

    def why_unmergeable(self, layer: nn.Module) -> str | None:
        """The reason why no weights of the base can hold a bottleneck."""
        return "a bottleneck has a nonlinearity, which no weight can hold: it stays a layer more"

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: it cannot be merged."""
        yield from ()

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights and biases of down and up, and of the norm."""
        for name, parameter in self.named_parameters():
            yield f"{path}.bottleneck.{name}", parameter
