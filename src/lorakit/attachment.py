"""What lorakit keeps about a model that has adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle

from lorakit.adapter import Adapter
from lorakit.errors import AttachError, did_you_mean
from lorakit.methods.layer import AdaptedLayer, Changes, Route, Update, adopt
from lorakit.models.base import base_parameters
from lorakit.models.identity import BaseIdentity, identify
from lorakit.models.load import model_name
from lorakit.models.roles import shared_inputs, task_heads
from lorakit.pristine import Pristine


@dataclass
class Attachment:
    """What lorakit keeps about a model that has adapters: kept on the model as `_lorakit`."""

    route: Route
    identity: BaseIdentity | None
    frozen: dict[str, bool]
    """requires_grad of the base's parameters before the first adapter came."""
    adapters: dict[str, Adapter] = field(default_factory=dict)
    """What was attached, by name, without tensors: those live in the layers."""
    pristine: dict[str, dict[str, Pristine]] = field(default_factory=dict)
    """Unmerged weights by module path and parameter name, while an adapter is merged."""
    hooks: dict[str, RemovableHandle] = field(default_factory=dict)
    """What keeps gradients alive under reentrant checkpointing, by the path of the block."""
    layers: dict[int, AdaptedLayer] = field(default_factory=dict)
    """The adapted layers by their numbers."""
    paths: dict[int, str] = field(default_factory=dict)
    """The paths of the adapted layers by their numbers."""
    updates: dict[str, dict[int, Update]] = field(default_factory=dict)
    """What each adapter does, by its name and the layer's number."""
    inputs: dict[str, str] = field(default_factory=dict)
    """A word for the input of those layers that read the same as their neighbours, by path."""
    compiled: bool = False
    """Whether routes take the one form that torch.compile need not compile again."""
    mixed: tuple[Any, Changes] | None = None
    """The latest mixed batch: what it was made from, and what it does to each layer."""

    def adopt(self, path: str, layer: nn.Module) -> AdaptedLayer:
        """Turn a layer into an adapted layer, if it is not one yet, and know it by its number."""
        adapted = adopt(layer, self.route, reads=self.inputs.get(path, path))
        self.layers[adapted.adapter_number] = adapted
        self.paths[adapted.adapter_number] = path
        return adapted

    def activate(self, name: str | None) -> None:
        """Make one adapter, or the base, answer for all rows."""
        plain = name is None or name == self.route.merged
        self.route.changes = None if plain else self.updates[cast(str, name)]
        self.route.active = name
        if not self.route.depth:
            self.route.switched = name

    @contextmanager
    def routed(self, changes: Changes | None, active: str | None) -> Iterator[None]:
        """Change the route for the time of a block; it is restored also after an error."""
        route = self.route
        before = route.changes, route.active
        route.depth += 1
        route.changes, route.active = changes, active
        try:
            yield
        finally:
            route.depth -= 1
            if route.depth:
                route.changes, route.active = before
            else:
                # By name, because its content may have been replaced or taken out meanwhile.
                self.activate(route.switched if route.switched in self.updates else None)


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return what is attached to a model, also through torch.compile's or DDP's wrapper."""
    return cast("Attachment | None", getattr(unwrapped(model), "_lorakit", None))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's or DDP's wrapper."""
    for wrapper in ("module", "_orig_mod"):
        model = cast(nn.Module, getattr(model, wrapper, model))
    return model


def require_attachment(model: nn.Module) -> Attachment:
    """Return what is attached to a model.

    Raises:
        AttachError: nothing is.
    """
    found = attachment_of(model)
    if found is None:
        raise AttachError("this model has no adapter: attach one first with lk.attach(model, ...)")
    return found


def identity_of(model: nn.Module) -> BaseIdentity | None:
    """Return the identity of a model's base, which is taken once, before the first adapter."""
    state = attachment_of(model)
    if state is not None:
        return state.identity
    return identify(model, name=model_name(model), skip=task_heads(model))


def attached(model: nn.Module) -> Attachment:
    """Return what is attached to a model, after making room for adapters if it had none."""
    state = attachment_of(model)
    if state is None:
        frozen = {path: p.requires_grad for path, p in base_parameters(model)}
        state = Attachment(route=Route(), identity=identity_of(model), frozen=frozen)
        state.inputs = shared_inputs(model)
        model.requires_grad_(False)
        model._lorakit = state  # type: ignore[assignment]
    return state


def require_name(state: Attachment, name: str) -> None:
    """Check that an adapter of this name is attached.

    Raises:
        AttachError: it is not.
    """
    if name not in state.adapters:
        raise AttachError(
            f"no adapter called {name!r} is attached{did_you_mean(name, state.adapters)}; "
            f"attached: {', '.join(state.adapters)}"
        )


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the attached adapters, in the order in which they came."""
    state = attachment_of(model)
    return tuple(state.adapters) if state else ()


def active_name(model: nn.Module) -> str | None:
    """Return the name of the adapter in use, or None for the base."""
    state = attachment_of(model)
    return None if state is None else state.route.active
