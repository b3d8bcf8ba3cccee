"""One adapted layer: a layer of the base, a bank of updates, and a route that picks among them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import RouteError
from lorakit.layers.token_positions import Placed, Prompted
from lorakit.models.base import base_modules
from lorakit.upstream.private_names import in_backward, own_parameters


def bank_key(name: str) -> str:
    """The child name for an adapter: torch allows no dots, and its own methods' names."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")


class Operation(ABC):
    """What is done to one layer's output: by one adapter, or by several to rows of their own."""

    replaces_output = False
    """Whether the base's own output is not needed."""
    is_whole = False
    """Whether it counts only by itself in a row, at strength 1."""
    virtual_tokens: VirtualTokens | None = None
    """The tokens that rows get, where this is done to the input embedding."""

    @abstractmethod
    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The adapted output for a layer's inputs and its own output.

        May write into `output`, which is the layer's own, fresh result.
        """

    def read(self, name: str, weight: Tensor) -> Tensor:
        """Return what is read in place of a parameter that is used outside of any layer's call."""
        return weight

    def tokens_of_rows(self, found: int) -> list[VirtualTokens | None]:
        """The virtual tokens of each of so many rows."""
        return [self.virtual_tokens] * found


Operations = Mapping[int, Operation]
"""What a route does, by the number of the adapted layer; layers that are not in it stay as is."""


@dataclass
class Route:
    """Which adapter each row uses. One object is shared by all adapted layers of a model.

    A switch is one assignment to `changes`; a forward pass reads nothing else.
    """

    operations: Operations | None = None
    """What is done to each layer; None: the base."""
    active: str | None = None
    """The adapter of every row; None: the base, or rows differ."""
    switched: str | None = None
    """What answers outside all `with` blocks: an adapter, or None for the base."""
    outside: Operations | None = None
    """What is done outside all `with` blocks."""
    depth: int = 0
    """How many `with` blocks of routes are open."""
    rows: int | None = None
    """How many rows the batch must have; None: any number."""
    repeats: int = 1
    """How many rows `generate` makes of each at present: beams, or several answers."""
    merged: str | None = None
    """The adapter that the base's weights hold at present."""
    layers: int = 0
    """How many layers were adopted so far; the next one gets this number."""
    recorded: Operations | None = None
    """What the latest forward pass did that was made for training."""
    replayed: tuple[Operations | None, Placed | None] | None = None
    """What a backward pass repeats at the moment; None: it repeats nothing."""
    prompted: Prompted = field(default_factory=Prompted)
    """Where the virtual tokens of the batch at hand stand."""

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle, which is outside of all blocks."""
        closed = {"operations": self.outside, "active": self.switched}
        closed |= {"recorded": None, "replayed": None}
        return vars(self) | closed | {"depth": 0, "rows": None, "repeats": 1}

    def check_recomputation(self) -> None:
        """Note what a forward pass does, and compare it where a backward pass repeats one.

        Raises:
            RouteError: activations are recomputed (gradient checkpointing) under another route
                than the one of the forward pass, which would give the gradients of another model.
        """
        if not in_backward():
            self.recorded = self.operations
        elif self.replayed is None and self.recorded is not self.operations:
            raise RouteError(
                "the backward pass recomputes activations (gradient checkpointing), but the route "
                "of the forward pass is over: call backward() inside its `with` block"
            )

    @property
    def in_force(self) -> Operations | None:
        """Return what is done to each layer at the moment."""
        return self.operations if self.replayed is None else self.replayed[0]

    @property
    def placed(self) -> Placed | None:
        """Return where virtual tokens stand in the rows at hand; None: there are none.

        Raises:
            RouteError: no call of the model is under way, which alone knows.
        """
        if self.replayed is not None:
            return self.prompted.narrowed(self.replayed[1])
        if not self.prompted.calls:
            raise RouteError(
                "the adapter in use has virtual tokens, which the model itself puts into its rows: "
                "call the model, not a part of it, or switch the adapter off"
            )
        return self.prompted.narrowed(self.prompted.calls[-1].placed)

    @contextmanager
    def replaying(self, operations: Operations | None, placed: Placed | None) -> Iterator[None]:
        """Do what an earlier forward pass did, inside a block, whatever the route is by now."""
        before = self.replayed
        self.replayed = (operations, placed)
        try:
            yield
        finally:
            self.replayed = before


class Update(nn.Module, Operation):
    """What one adapter does to one layer; made frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["training"] = False

    @abstractmethod
    def adapt(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        output: Any,
        *,
        weight: float = 1.0,
        base: Any = None,
    ) -> Any:
        """The adapted output for a layer's inputs and its own output.

        Args:
            layer: the adapted layer.
            inputs: its positional arguments.
            output: what to change: the layer's own output, or what another adapter made of it. It
                may be written into.
            strength: factor on the update.
            base: the layer's own output, where `output` is not that.
        """

    def let_train(self) -> None:
        """Let its weights take gradients, but for those that its method keeps as they are."""
        self.requires_grad_()

    @property
    def unmergeable(self) -> str | None:
        """Return why no weights of the base can hold this update, or None where they can."""
        return None

    @abstractmethod
    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the merged value, in precision `exact`, of each changed parameter."""

    @abstractmethod
    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield its tensors under their names in an `Adapter`.

        Args:
            path: of the layer.
        """


class AdaptedLayer(nn.Module):
    """Mixed into a layer's own class by `adopt`; see docs/design/layers.md for the reasons."""

    base_class: type[nn.Module]
    adapter_bank: nn.ModuleDict
    adapter_route: Route
    adapter_number: int
    """The key of this layer in `Route.changes`."""
    adapter_pinned: tuple[Operation | None] | None = None
    """What compiled code does in place of what the route says, if it is pinned.

    Layers whose blocks share compiled code must not be told apart by their numbers in it.
    """
    adapter_input: str
    """Layers with the same word here read one input: q, k and v of one attention, for example."""
    uncalled: tuple[str, ...]
    """Parameters that are read outside of any layer's call."""

    def current_operation(self) -> Operation | None:
        """Return what the route does to this layer, if anything."""
        if torch.compiler.is_compiling() and self.adapter_pinned is not None:
            return self.adapter_pinned[0]
        operations = self.adapter_route.in_force
        return None if operations is None else operations.get(self.adapter_number)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output, changed as the route says."""
        # Reentrant checkpointing runs its forward pass without gradients, but in training.
        if (torch.is_grad_enabled() or self.training) and not torch.compiler.is_compiling():
            self.adapter_route.check_recomputation()
        operation = self.current_operation()
        if operation is None:
            return super().forward(*args, **kwargs)
        output = None if operation.replaces_output else super().forward(*args, **kwargs)
        if kwargs:
            args = _in_places(self.base_class.forward, self, args, kwargs)
        if isinstance(output, tuple):
            # Blocks of some families return more than the hidden states.
            return (operation.adapt(self, args, output[0]), *output[1:])
        return operation.adapt(self, args, output)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists only in this process; a copy or a pickle makes it anew.
        return _blank, (self.base_class, self.uncalled), self.__dict__


def _in_places(
    forward: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call by place, as far as the signature has places for them."""
    bound = inspect.signature(forward).bind(layer, *args, **kwargs)
    bound.apply_defaults()
    return bound.args[1:]


_ADAPTED: dict[tuple[type[nn.Module], tuple[str, ...]], type[AdaptedLayer]] = {}


def adapted_class(base: type[nn.Module], uncalled: tuple[str, ...] = ()) -> type[AdaptedLayer]:
    """The subclass of a layer's class that looks for updates; there is one of each sort.

    Args:
        base: the layer's own class.
        direct: parameters that are read outside of any layer's call.
    """
    if (base, uncalled) not in _ADAPTED:
        members = {
            "base_class": base,
            "uncalled": uncalled,
            **{n: _read_as_routed(n) for n in uncalled},
        }
        _ADAPTED[base, uncalled] = type(f"Adapted{base.__name__}", (AdaptedLayer, base), members)
    return _ADAPTED[base, uncalled]


def _read_as_routed(name: str) -> property:
    def read(layer: AdaptedLayer) -> Tensor:
        weight, operation = cast(Tensor, own_parameters(layer)[name]), layer.current_operation()
        return weight if operation is None else operation.read(name, weight)

    return property(read)


def _blank(base: type[nn.Module], uncalled: tuple[str, ...]) -> nn.Module:
    made = adapted_class(base, uncalled)
    return made.__new__(made)


def convert(
    layer: nn.Module, route: Route, *, reads: str, uncalled: tuple[str, ...] = ()
) -> AdaptedLayer:
    """Turn a layer into an adapted layer, in place; one that is adapted already stays as it is.

    Args:
        layer: any module of the base.
        route: that of the model.
        reads: a word for its input.
        direct: its parameters that are read outside of any layer's call.

    The class changes last, so that a forward pass in another thread sees the layer either as it was
    or complete.
    """
    if not isinstance(layer, AdaptedLayer):
        layer.adapter_bank = nn.ModuleDict()
        layer.adapter_route = route  # type: ignore[assignment]
        layer.adapter_number = route.layers  # type: ignore[assignment]
        layer.adapter_input = reads  # type: ignore[assignment]
        route.layers += 1
        layer.__class__ = adapted_class(type(layer), uncalled)
    return cast(AdaptedLayer, layer)


def restore(layer: nn.Module) -> None:
    """Turn an adapted layer into what it was before `adopt`."""
    assert isinstance(layer, AdaptedLayer)
    layer.__class__ = layer.base_class  # type: ignore[assignment]
    for name in ("adapter_bank", "adapter_route", "adapter_number", "adapter_input"):
        delattr(layer, name)


def update_of(layer: AdaptedLayer, name: str) -> Update | None:
    """Return what the adapter of this name does to a layer, or None if it leaves it alone."""
    key = bank_key(name)
    return cast(Update, layer.adapter_bank[key]) if key in layer.adapter_bank else None


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield the path and the object of each adapted layer."""
    for path, module in base_modules(model):
        if isinstance(module, AdaptedLayer):
            yield path, module
