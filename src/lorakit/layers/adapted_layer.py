"""One adapted layer: a layer of the base, a bank of updates, and the route it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.layers.class_swap import SwappedModule, swap_back, swapped_class
from lorakit.layers.instance_forward import InstanceForward
from lorakit.layers.operation import Operation, Update
from lorakit.layers.route import Route
from lorakit.models.base import BANK, base_modules
from lorakit.upstream.private_names import (
    accelerate_forward,
    own_modules,
    own_parameters,
    set_accelerate_forward,
)


def bank_key(name: str) -> str:
    """The child name for an adapter: torch allows no dots, and its own methods' names."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")


def adapter_name(key: str) -> str:
    """The name of the adapter that has this child name."""
    return key.removeprefix("@").replace("%2E", ".").replace("%25", "%")


class LayerBank(nn.ModuleDict):
    """The updates of one adapted layer, by `bank_key`."""

    def __repr__(self) -> str:
        """One line: what each adapter has here."""
        updates = cast(Mapping[str, Update], own_modules(self))
        return "; ".join(f"{adapter_name(key)}: {each.summary}" for key, each in updates.items())


class AdaptedLayer(SwappedModule):
    """Mixed into a layer's own class by `convert`; see docs/design/layers.md for the reasons."""

    prefix = "Adapted"
    adapter_bank: LayerBank
    adapter_route: Route
    adapter_number: int
    """The key of this layer in the operations of a frame."""
    adapter_path: str
    """The layer's path in the model."""
    adapter_input: str
    """Layers with the same word here read one input: q, k and v of one attention, for example."""
    adapter_pinned: tuple[Operation | None] | None = None
    """The operation in compiled code, whatever the route is; None: that of the route.

    Layers whose blocks share compiled code must not be told apart by their numbers in it.
    """
    adapter_patch: InstanceForward | None = None
    """The forward pass that somebody put on this object; None: nobody did."""
    adapter_pieces: bool = False
    """Whether its input has several entries for each row, one row after the other."""
    adapter_listed: bool = False
    """Whether it is in a list of modules that code chooses from: blocks, experts."""
    adapter_experts: int | None = None
    """The number of the module of experts that gives it the tokens which chose its expert."""
    uncalled: tuple[str, ...]
    """Parameters that are read without a module call."""

    def current_operation(self) -> Operation | None:
        """The layer's active operation; None: the base answers."""
        if torch.compiler.is_compiling() and self.adapter_pinned is not None:
            return self.adapter_pinned[0]
        operations = self.adapter_route.top.operations
        return None if operations is None else operations.get(self.adapter_number)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, changed by the active operation."""
        if not isinstance(self, AdaptedLayer):
            # Whoever read this method before `detach` still calls it.
            return type(self).forward(self, *args, **kwargs)
        if self.adapter_patch is not None:
            self.adapter_patch.note()
        if self.adapter_route.waiting and not torch.compiler.is_compiling():
            self.adapter_route.waiting.discard(self.adapter_number)
        # Reentrant checkpointing runs its forward pass without gradients, but in training.
        if (torch.is_grad_enabled() or self.training) and not torch.compiler.is_compiling():
            self.adapter_route.check_recomputation()
        operation = self.current_operation()
        if operation is None:
            return super().forward(*args, **kwargs)
        output = None if operation.replaces_output else super().forward(*args, **kwargs)
        return _adapted(self, operation, output, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a forward pass of the object's own has the adapter too."""
        if name == "forward":
            self.adapter_patch = value = InstanceForward(self, value, adapt_output)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        """As its own class shows it, and what each adapter has here where that does not say it."""
        shown = super().__repr__()
        return shown if f"({BANK}): " in shown else f"{shown} ({BANK}): {self.adapter_bank!r}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists only in this process; a copy or a pickle makes it anew.
        return _blank, (self.own_class, self.uncalled), self.__dict__


class ReadLayer(AdaptedLayer):
    """An adapted layer with parameters that others read, who get those with the update.

    Its own call reads the base's, since the update comes after it.
    """

    adapter_inside: bool = False
    """Whether its own call is being compiled."""

    @property
    def is_inside(self) -> bool:
        """Whether the layer's own call runs in this thread."""
        if torch.compiler.is_compiling():
            return self.adapter_inside
        return self.adapter_number in self.adapter_route.own.calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, changed by the active operation."""
        if not isinstance(self, ReadLayer):
            return type(self).forward(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            with self.own_call():
                return super().forward(*args, **kwargs)
        self.adapter_inside = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.adapter_inside = False

    @contextmanager
    def own_call(self) -> Iterator[None]:
        """Let the parameters be the base's in this thread, inside a block."""
        calls = self.adapter_route.own.calls
        calls.append(self.adapter_number)
        try:
            yield
        finally:
            calls.pop()


def adapt_output(
    layer: nn.Module, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A layer's output, made by somebody else's forward pass, changed by the active operation."""
    if not isinstance(layer, AdaptedLayer):
        return output
    layer.adapter_route.waiting.discard(layer.adapter_number)
    operation = layer.current_operation()
    return output if operation is None else _adapted(layer, operation, output, args, kwargs)


def _adapted(
    layer: AdaptedLayer,
    operation: Operation,
    output: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if kwargs:
        args = _positional(layer.own_class.forward, layer, args, kwargs)
    if isinstance(output, tuple) and not operation.replaces_output:
        # Blocks of some families return more than the hidden states.
        return (operation.adapt(layer, args, output[0]), *output[1:])
    return operation.adapt(layer, args, output)


def _positional(
    forward: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call as positional ones, as far as the signature allows that."""
    bound = inspect.signature(forward).bind(layer, *args, **kwargs)
    bound.apply_defaults()
    return bound.args[1:]


def adapted_class(base: type[nn.Module], uncalled: tuple[str, ...] = ()) -> type[AdaptedLayer]:
    """The subclass of a layer's class that looks for its operation; made once for each class.

    Args:
        base: the layer's own class.
        uncalled: parameters that are read without a module call.
    """
    members: list[tuple[str, Any]] = [(name, _read_as_routed(name)) for name in uncalled]
    if issubclass(base, nn.Sequential):
        # It calls its children one after the other, and the updates are no step of it.
        members += [("__iter__", _own_children), ("__len__", _count_of_own_children)]
    kind = ReadLayer if uncalled else AdaptedLayer
    made = swapped_class(kind, base, ("uncalled", uncalled), *members)
    return cast(type[AdaptedLayer], made)


def _own_children(layer: nn.Module) -> Iterator[nn.Module | None]:
    return iter([child for name, child in own_modules(layer).items() if name != BANK])


def _count_of_own_children(layer: nn.Module) -> int:
    return sum(name != BANK for name in own_modules(layer))


@cache
def _read_as_routed(name: str) -> property:
    def read(layer: ReadLayer) -> Tensor:
        weight, operation = cast(Tensor, own_parameters(layer)[name]), layer.current_operation()
        return weight if operation is None else operation.read(name, weight, inside=layer.is_inside)

    return property(read)


def _blank(base: type[nn.Module], uncalled: tuple[str, ...]) -> nn.Module:
    made = adapted_class(base, uncalled)
    return made.__new__(made)


def convert(
    layer: nn.Module,
    route: Route,
    path: str,
    *,
    reads: str,
    uncalled: tuple[str, ...] = (),
    pieces: bool = False,
    listed: bool = False,
    experts: int | None = None,
) -> AdaptedLayer:
    """Turn a layer into an adapted layer, in place; one that is adapted already stays as it is.

    The class changes last, so that a forward pass in another thread sees the layer either as it was
    or complete.

    Args:
        layer: any module of the base.
        route: that of the model.
        path: of the layer in the model.
        reads: a word for its input.
        uncalled: its parameters that are read without a module call.
        pieces: whether its input has several entries for each row, one row after the other.
        listed: whether it is in a list of modules that code chooses from: blocks, experts.
        experts: the number of the module of experts that it is in.
    """
    if not isinstance(layer, AdaptedLayer):
        adapted = cast(AdaptedLayer, layer)
        adapted.adapter_bank = LayerBank()
        adapted.adapter_route, adapted.adapter_path, adapted.adapter_input = route, path, reads
        adapted.adapter_pieces, adapted.adapter_listed = pieces, listed
        adapted.adapter_experts = experts
        adapted.adapter_number = route.layers
        route.layers += 1
        own = type(layer)
        layer.__class__ = adapted_class(own, uncalled)
        _take_over(adapted, own)
    return cast(AdaptedLayer, layer)


def _take_over(layer: AdaptedLayer, own: type[nn.Module]) -> None:
    """Have the adapter act in a forward pass that was put on the object before.

    Within accelerate's, inputs and weights are where they belong.
    """
    hooked = accelerate_forward(layer)
    if isinstance(hooked, MethodType) and hooked.__func__ is own.forward:
        set_accelerate_forward(layer, MethodType(type(layer).forward, layer))
    if "forward" in vars(layer):
        cast(Any, layer).forward = vars(layer)["forward"]


def _hand_back(layer: nn.Module) -> None:
    """Leave somebody else's forward pass on the object as it would be without an adapter."""
    hooked = accelerate_forward(layer)
    ours = (AdaptedLayer.forward, ReadLayer.forward)
    if isinstance(hooked, MethodType) and hooked.__func__ in ours:
        set_accelerate_forward(layer, MethodType(type(layer).forward, layer))
    patch = vars(layer).get("forward")
    if isinstance(patch, InstanceForward):
        vars(layer)["forward"] = patch.own
    vars(layer).pop("adapter_patch", None)


def restore(layer: nn.Module) -> None:
    """Turn an adapted layer into what it was before `convert`."""
    assert isinstance(layer, AdaptedLayer)
    swap_back(layer)
    _hand_back(layer)
    for name in ("bank", "route", "number", "path", "input", "pieces", "listed", "experts"):
        delattr(layer, f"adapter_{name}")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield the path and the object of each adapted layer."""
    for path, module in base_modules(model):
        if isinstance(module, AdaptedLayer):
            yield path, module
