"""Frozen norms and gated activations that keep less for the backward pass, while a run lasts.

A module takes part if it computes what `lorakit.kernels.norms_and_gates` does. That is probed, not
looked up: transformers' classes have many names for the same lines, and one name for different
ones. As with adapted layers, the class of the object changes and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from lorakit.kernels.norms_and_gates import GateActivation, gated, rms_norm
from lorakit.kernels.stand_in import kind_of_device, with_values
from lorakit.layers.class_swap import SwappedModule, swap_back, swapped_class
from lorakit.models.base import base_modules
from lorakit.models.quantized_weight import float_weight
from lorakit.upstream.private_names import (
    has_hooks,
    own_buffers,
    own_modules,
    own_parameters,
    twin_of,
)

MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class MemoryEfficientModule(SwappedModule):
    """Mixed into a module's own class for as long as a run lasts."""

    prefix = "MemoryEfficient"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A copy or a pickle is not part of the run: it gets the module's own class.
        own = self.own_class
        return own.__new__, (own,), self.__dict__


class MemoryEfficientNorm(MemoryEfficientModule):
    """A root-mean-square norm with a frozen weight."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """The own class's output; where x has a gradient, less is kept for the backward pass."""
        weight = self.weight
        if not _records(x) or weight.requires_grad or x.dtype != weight.dtype:
            return super().forward(x)
        return rms_norm(x, weight, self.variance_epsilon)


class MemoryEfficientMLP(MemoryEfficientModule):
    """A feed-forward part with a gate: down(activation(gate(x))·up(x))."""

    activation: GateActivation

    def forward(self, x: Tensor) -> Tensor:
        """The own class's output, with less kept for the backward pass."""
        parts = cast(Any, self)
        if not (torch.is_grad_enabled() and self.training) or _is_special(x):
            return super().forward(x)
        return parts.down_proj(gated(parts.gate_proj(x), parts.up_proj(x), self.activation))


def _records(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and not _is_special(x)


def _is_special(x: Tensor) -> bool:
    """Whether something else than these lines decides precisions or keeps activations."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(kind_of_device(x))


@contextmanager
def memory_efficient(model: nn.Module) -> Iterator[list[str]]:
    """Let a model's frozen norms and gated activations keep less for the backward pass.

    Values stay the same bit for bit on CPUs, gradients to rounding. Parameters, names and hooks
    stay as they are, and so do all modules whose arithmetic is not known. Not to be nested.

    Yields:
        The paths of the modules that changed. They change back at the end, also after an error.
    """
    changed: dict[str, nn.Module] = {}
    try:
        for path, module in base_modules(model):
            better = _better_class(module)
            if better is not None:
                changed[path] = module
                module.__class__ = better
        yield list(changed)
    finally:
        for module in changed.values():
            swap_back(module)


def _better_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that computes the same as a module and keeps less, if there is one."""
    own = type(module)
    if "forward" in vars(module) or isinstance(module, MemoryEfficientModule):
        # A forward of the object's own belongs to whoever put it there.
        return None
    if _looks_like_norm(module) and _is_rms_norm(module):
        return swapped_class(MemoryEfficientNorm, own)
    if set(own_modules(module)) == MLP_PARTS and not own_parameters(module):
        activation = _activation_of(module)
        return activation and swapped_class(MemoryEfficientMLP, own, ("activation", activation))
    return None


def _looks_like_norm(module: nn.Module) -> bool:
    weight = own_parameters(module).get("weight")
    alone = not own_modules(module) and not own_buffers(module) and len(own_parameters(module)) == 1
    return (
        alone
        and weight is not None
        and weight.dim() == 1
        and not weight.requires_grad
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is the norm of `rms_norm`, by a probe with its own weight."""
    weight, eps = cast(Tensor, module.weight), cast(float, module.variance_epsilon)
    if weight.is_meta:
        # Any weight tells what the module computes with it.
        values = torch.linspace(0.5, 1.5, len(weight), dtype=weight.dtype)
        module, weight = _with_weight(module, values), values
    x = _sample(len(weight), weight)
    return _agree(module.forward, lambda x: rms_norm(x, weight, eps), x)


def _with_weight(module: nn.Module, values: Tensor) -> nn.Module:
    """A twin of a module that has another weight."""
    twin = twin_of(module)
    vars(twin)["_parameters"] = {"weight": nn.Parameter(values, requires_grad=False)}
    return twin


def _activation_of(module: nn.Module) -> GateActivation | None:
    """The activation of a feed-forward part, found by trial without its weights.

    The module's own lines run with simple functions in the place of its projections.
    """
    act_fn = cast(nn.Module, module.act_fn)
    if has_hooks(act_fn):
        # Whoever put them there expects to be called.
        return None
    stand_in = SimpleNamespace(
        gate_proj=lambda x: 1.5 * x, up_proj=_reversed, down_proj=_reversed, act_fn=act_fn.forward
    )
    own: Any = type(module).forward
    x = _sample(64, float_weight(cast(Any, module).gate_proj))

    def ours(x: Tensor, *, activation: GateActivation) -> Tensor:
        return _reversed(gated(1.5 * x, _reversed(x), activation))

    for activation in get_args(GateActivation):
        if _agree(partial(own, stand_in), partial(ours, activation=activation), x):
            return activation
    return None


def _reversed(x: Tensor) -> Tensor:
    return x.flip(-1)


def _sample(width: int, like: Tensor) -> Tensor:
    """Tokens of usual and of small sizes."""
    device = with_values(like.device)
    scales = torch.tensor([[4.0], [1.0], [0.01]])
    tokens = torch.linspace(-1, 1, 3 * width).reshape(3, width).roll(width // 3, dims=-1) * scales
    return tokens.to(device, like.dtype).requires_grad_()


def _agree(own: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether two functions have the same values, bit for bit on CPUs, and near gradients."""
    try:
        with torch.enable_grad():
            (wanted, slope), (found, own_slope) = (_with_gradient(f, x) for f in (own, ours))
    except (AttributeError, TypeError, RuntimeError):
        # The module reads something that it would have only in the model: it does more than this.
        return False
    same = _near(found, wanted) if x.is_cuda else torch.equal(found, wanted)
    return same and _near(own_slope, slope)


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y = function(x)
    weights = torch.linspace(0.5, 2, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    (gradient,) = torch.autograd.grad(y, x, weights)
    return y, gradient


def _near(found: Tensor, wanted: Tensor) -> bool:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    # transformers' norms round to float32, whatever the model's precision.
    unit = max(torch.finfo(wanted.dtype).eps, torch.finfo(torch.float32).eps)
    scale = float(wanted.detach().abs().max())
    return torch.allclose(found, wanted, rtol=0, atol=8 * unit * scale)
