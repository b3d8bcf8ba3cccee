"""What lorakit keeps about a model that has adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.base_modules import BaseModules
from lorakit.attachment.original_weights import OriginalWeight
from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import AttachError, RouteError, did_you_mean
from lorakit.layers.checkpointing import keep_routes, stacks_of_blocks
from lorakit.layers.layer import AdaptedLayer, Operations, Route, Update, convert
from lorakit.models.base import base_modules, base_parameters
from lorakit.models.families import layers_shared_by_batch, uncalled_weights
from lorakit.models.identity import BaseIdentity, identify
from lorakit.models.load import model_name
from lorakit.models.quantized import original_identity
from lorakit.models.roles import output_head, shared_inputs, task_heads
from lorakit.upstream.private_names import COMPILED_WRAPPER, compiled_call, is_compiled_wrapper

FORGOTTEN: Operations = {}
"""Takes the place of changes whose memory may go; nothing that comes is this object."""


class Lock:
    """A re-entrant lock; a copy or a pickle of it is a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


@dataclass
class Attachment:
    """What lorakit keeps about a model that has adapters: kept on the model as `_lorakit`."""

    route: Route
    identity: BaseIdentity | None
    frozen: dict[str, bool]
    """requires_grad of the base's parameters before the first adapter came."""
    adapters: dict[str, Adapter] = field(default_factory=dict)
    """What was attached, by name, without tensors: those live in the layers."""
    original_weights: dict[str, dict[str, OriginalWeight]] = field(default_factory=dict)
    """Unmerged weights by module path and parameter name, while an adapter is merged."""
    hooks: dict[str, RemovableHandle] = field(default_factory=dict)
    """On the model what counts a batch's rows, on its output head what keeps a frozen one fast, on
    stacks of blocks what makes checkpointing right."""
    layers: dict[int, AdaptedLayer] = field(default_factory=dict)
    """The adapted layers by their numbers."""
    paths: dict[int, str] = field(default_factory=dict)
    """The paths of the adapted layers by their numbers."""
    updates: dict[str, dict[int, Update]] = field(default_factory=dict)
    """What each adapter does, by its name and the layer's number."""
    inputs: dict[str, str] = field(default_factory=dict)
    """A word for the input of those layers that read the same as their neighbours, by path."""
    uncalled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The parameters that are read outside of any layer's call, by their module's path."""
    shared_by_batch: frozenset[str] = frozenset()
    """The paths of the layers whose input all rows share."""
    compiled: bool = False
    """Whether routes take the one form that torch.compile need not compile again."""
    mixed: tuple[Any, Operations, Any] | None = None
    """The latest mixed batch: what it was made from, what it does to each layer, and the memory
    that it was made from."""
    modules: BaseModules | None = None
    """What adapters are compared with, as long as the base has these modules."""
    lock: Lock = field(default_factory=Lock)
    """Held for moments, where the route changes, or what an adapter does."""

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle."""
        # A copy's parameters lie elsewhere, so it makes its mixed batches anew.
        return vars(self) | {"mixed": None, "modules": None}

    def convert(self, path: str, layer: nn.Module) -> AdaptedLayer:
        """Turn a layer into an adapted layer, if it is not one yet, and know it by its number."""
        reads, uncalled = self.inputs.get(path, path), self.uncalled.get(path, ())
        adapted = convert(layer, self.route, reads=reads, uncalled=uncalled)
        self.layers[adapted.adapter_number] = adapted
        self.paths[adapted.adapter_number] = path
        return adapted

    def activate(self, name: str | None) -> None:
        """Make one adapter, or the base, answer for all rows: inside a block, until its end."""
        route = self.route
        with self.lock:
            plain = name is None or name == route.merged
            route.operations = None if plain else self.updates[cast(str, name)]
            route.active = name
            if not route.depth:
                route.switched, route.outside = name, route.operations

    def replace(self, name: str, updates: dict[int, Update], record: Adapter) -> None:
        """Let a name mean other updates from now on; a block that is open keeps what it has."""
        route = self.route
        with self.lock:
            if name in self.updates:
                self.mixed = None
            self.adapters[name], self.updates[name] = record, updates
            if route.switched == name and route.merged != name:
                route.outside = updates
                if not route.depth:
                    route.operations = updates

    def forget(self, name: str) -> dict[int, Update]:
        """A name's updates, and know it no more; a block that is open keeps what it has."""
        route = self.route
        with self.lock:
            del self.adapters[name]
            self.mixed = None
            if route.recorded is self.updates[name]:
                route.recorded = FORGOTTEN
            if route.switched == name:
                route.switched = route.outside = None
                if not route.depth:
                    route.operations = route.active = None
            return self.updates.pop(name)

    @contextmanager
    def routed(
        self, operations: Operations | None, active: str | None, rows: int | None
    ) -> Iterator[None]:
        """Change the route for the time of a block; it is restored also after an error."""
        route = self.route
        with self.lock:
            before = route.operations, route.active, route.rows
            route.depth += 1
            route.operations, route.active, route.rows = operations, active, rows
        try:
            yield
        finally:
            with self.lock:
                route.depth -= 1
                if route.recorded is operations is not before[0]:
                    route.recorded = FORGOTTEN
                # Outside, what answered before may have been replaced or taken out meanwhile.
                route.operations, route.active, route.rows = (
                    before if route.depth else (route.outside, route.switched, None)
                )
                route.repeats = 1


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return what is attached to a model, also through torch.compile's or DDP's wrapper."""
    found = vars(model).get("_lorakit")
    if found is None:
        found = vars(unwrapped(model)).get("_lorakit")
    return cast("Attachment | None", found)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's or DDP's wrapper."""
    for wrapper in ("module", COMPILED_WRAPPER):
        model = cast(nn.Module, getattr(model, wrapper, model))
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether a model's forward pass goes through torch.compile."""
    return is_compiled_wrapper(model) or compiled_call(model) is not None


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
    """The identity of a model's base, which is taken once, before the first adapter."""
    state = attachment_of(model)
    if state is not None:
        return state.identity
    original = original_identity(model)
    if original is not None:
        return replace(original, name=model_name(model))
    return identify(model, name=model_name(model), skip=task_heads(model))


def modules_of(model: nn.Module) -> BaseModules:
    """A base's modules by path, and what is remembered of them while they stay the same."""
    found, state = BaseModules(dict(base_modules(model))), attachment_of(model)
    if state is None:
        return found
    if state.modules is None or state.modules.by_path != found.by_path:
        state.modules = found
    return state.modules


def attached(model: nn.Module) -> Attachment:
    """Return what is attached to a model, after making room for adapters if it had none."""
    state = attachment_of(model)
    if state is None:
        frozen = {path: p.requires_grad for path, p in base_parameters(model)}
        state = Attachment(route=Route(), identity=identity_of(model), frozen=frozen)
        state.inputs, state.uncalled = shared_inputs(model), uncalled_weights(model)
        state.shared_by_batch = layers_shared_by_batch(model)
        state.hooks[""] = model.register_forward_pre_hook(check_rows, with_kwargs=True)
        for path, stack in stacks_of_blocks(model):
            state.hooks[f"blocks of {path}"] = stack.register_forward_pre_hook(keep_routes)
        head = output_head(model)
        if head is not None:
            state.hooks["head"] = head.register_forward_pre_hook(make_contiguous)
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
    """The names of the attached adapters, in the order in which they came."""
    state = attachment_of(model)
    return tuple(state.adapters) if state else ()


def active_name(model: nn.Module) -> str | None:
    """The name of the adapter in use, or None for the base."""
    state = attachment_of(model)
    return None if state is None else state.route.active


def virtual_tokens(model: nn.Module, name: str | None) -> VirtualTokens | None:
    """The virtual tokens that rows of an adapter get; None: it has none, or is none."""
    state = attachment_of(model)
    updates = state.updates[name].values() if state and name is not None else ()
    return next((each.virtual_tokens for each in updates if each.virtual_tokens), None)


def make_contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An output head's input in one piece: a forward pre-hook.

    transformers gives it the last positions of each row, which do not lie together, and then torch
    copies the weight once per row, if it is frozen (aten's matmul folds rows otherwise).
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def check_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare a batch with the route: a forward pre-hook, without state of its own.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    if torch.compiler.is_compiling():
        return
    state = attachment_of(model)
    if state is None or state.route.rows is None:
        return
    rows, found = state.route.rows, _batch_size(args, kwargs)
    if found in (None, rows) or (found % rows == 0 and _is_repeated(state.route, found, kwargs)):
        return
    raise RouteError(
        f"the route is for {rows} rows, but the batch has {found} rows; beams and several answers "
        "to a row are known only where generate uses its cache"
    )


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The rows of a model's first tensor."""
    named = (kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    tensors = (x for x in (*args, *named, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
    return next((x.shape[0] for x in tensors), None)


def _is_repeated(route: Route, found: int, kwargs: Mapping[str, Any]) -> bool:
    """Whether `generate` made several rows of each, and not a caller who gave too many.

    Its first pass, where its cache is empty, has the same prompt in each of them.
    """
    encoded, cache = kwargs.get("encoder_outputs"), kwargs.get("past_key_values")
    if encoded is not None:
        return _has_equal_rows(encoded[0], cast(int, route.rows))
    if cache is None:
        return False
    if cache.get_seq_length() == 0:
        ids = kwargs.get("input_ids")
        prompts = kwargs["inputs_embeds"] if ids is None else ids
        route.repeats = found // cast(int, route.rows)
        if not _has_equal_rows(prompts, cast(int, route.rows)):
            route.repeats = 1
    return found == cast(int, route.rows) * route.repeats


def _has_equal_rows(x: Tensor, groups: int) -> bool:
    """Whether each of so many groups of neighbours is one row several times, NaN included."""
    grouped = x.unflatten(0, (groups, -1))
    first = grouped[:, :1]
    return bool(((grouped == first) | ((grouped != grouped) & (first != first))).all())
