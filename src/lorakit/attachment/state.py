"""The state that lorakit keeps for a model with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.base_modules import BaseModules
from lorakit.attachment.effects import Effects, ModelCall
from lorakit.attachment.model_methods import GuardedMethod, guarded_methods, warn_of_save
from lorakit.attachment.original_weights import OriginalWeight
from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import AttachError, did_you_mean
from lorakit.layers.adapted_layer import AdaptedLayer, convert
from lorakit.layers.batch_rows import check_batch
from lorakit.layers.checkpointing import keep_routes, stacks_of_blocks
from lorakit.layers.operation import Update
from lorakit.layers.route import Frame, Route
from lorakit.models.base import base_modules, base_parameters, unwrapped
from lorakit.models.families import uncalled_weights, weights_read_inside
from lorakit.models.identity import BaseIdentity, identify
from lorakit.models.load import model_name
from lorakit.models.paths import is_within
from lorakit.models.quantized import original_identity
from lorakit.models.roles import output_head, shared_inputs, task_heads
from lorakit.models.rows_of_layers import (
    layers_for_all_rows,
    layers_in_pieces,
    within_experts,
)
from lorakit.upstream.private_names import compiled_call, is_compiled_wrapper

OTHER_LIBRARIES = ("peft", "loralib")
"""Packages whose layers hold adapters."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The facts about a base that are found out before its first adapter."""

    identity: BaseIdentity | None
    requires_grad: Mapping[str, bool]
    """By parameter name."""
    inputs: Mapping[str, str]
    """A word for the input of those layers that read the same as their neighbours, by path."""
    uncalled: Mapping[str, tuple[str, ...]]
    """The parameters that are read without a module call, by their module's path."""
    for_all_rows: Mapping[str, str]
    """Why rows cannot have adapters of their own in a layer, by its path."""
    in_pieces: frozenset[str]
    """The paths of the layers whose input has several entries for each row."""
    lists: frozenset[str]
    """The paths of lists of modules that code chooses from: blocks, experts."""
    experts: Mapping[str, str]
    """The module of experts that a layer is in, by the layer's path."""

    @staticmethod
    def of(model: nn.Module) -> Base:
        """The facts of a model without adapters."""
        return Base(
            identity=identity_of(model),
            requires_grad={path: p.requires_grad for path, p in base_parameters(model)},
            inputs=shared_inputs(model),
            uncalled=weights_read_inside(model) | uncalled_weights(model),
            for_all_rows=layers_for_all_rows(model),
            in_pieces=layers_in_pieces(model),
            lists=frozenset(p for p, m in base_modules(model) if isinstance(m, nn.ModuleList)),
            experts=within_experts(model),
        )


@dataclass(frozen=True)
class Attached:
    """One attached adapter."""

    record: Adapter
    """What was attached, without tensors: those are in the layers."""
    updates: Mapping[int, Update]
    """By the layer's number."""
    frame: Frame
    """The frame in which all rows use it; its operations are the updates."""


@dataclass(eq=False)
class Attachment:
    """The state of a model with adapters, an attribute of the model: `_lorakit`."""

    base: Base
    route: Route = field(default_factory=Route)
    adapters: dict[str, Attached] = field(default_factory=dict)
    """By name, in the order in which they came."""
    layers: dict[int, AdaptedLayer] = field(default_factory=dict)
    """The adapted layers by their numbers."""
    original_weights: dict[str, dict[str, OriginalWeight]] = field(default_factory=dict)
    """Unmerged weights by module path and parameter name, while an adapter is merged."""
    rounded_to: torch.dtype | None = None
    """What the latest merge was asked to round to; None: the weights' own precision."""
    hooks: dict[str, RemovableHandle | GuardedMethod] = field(default_factory=dict)
    """The hooks on the model, its output head, its input embedding and its stacks of blocks, and
    the methods of the model that look at adapters first."""
    compiled: bool = False
    """Whether routes take the one form that torch.compile need not compile again."""
    mixed: tuple[Any, Frame, Any] | None = None
    """The latest mixed batch: what it was made from, its frame, and the memory of its weights."""
    effects: Effects = field(default_factory=Effects)
    """What was found out about layers in calls of the model."""
    modules: BaseModules | None = None
    """What adapters are compared with, as long as the base has these modules."""

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle."""
        # A copy's parameters are elsewhere in memory, so it makes its mixed batches anew.
        return vars(self) | {"mixed": None, "modules": None}

    def convert(self, model: nn.Module, path: str) -> AdaptedLayer:
        """Turn one of a model's layers into an adapted layer, and know it by its number."""
        reads, uncalled = self.base.inputs.get(path, path), self.base.uncalled.get(path, ())
        around = self.base.experts.get(path)
        adapted = convert(
            unwrapped(model).get_submodule(path),
            self.route,
            path,
            reads=reads,
            uncalled=uncalled,
            pieces=path in self.base.in_pieces,
            listed=is_within(path, self.base.lists),
            # Where rows differ, it is the module of all experts that knows whose tokens are whose.
            experts=None if around is None else self.convert(model, around).adapter_number,
        )
        self.layers[adapted.adapter_number] = adapted
        return adapted

    def idle(self) -> list[int]:
        """The numbers of the adapted layers that no adapter needs any more."""
        used = {number for number, layer in self.layers.items() if layer.adapter_bank}
        around = [self.layers[number].adapter_experts for number in used]
        used |= {number for number in around if number is not None}
        return [number for number in self.layers if number not in used]

    def activate(self, name: str | None) -> None:
        """Have one adapter, or the base, answer for all rows: inside a block, until its end."""
        with self.route.lock:
            if name is None:
                self.route.switch(Frame())
            elif name == self.route.merged:
                self.route.switch(self.route.bottom)
            else:
                self.route.switch(self.adapters[name].frame)

    def replace(self, name: str, updates: Mapping[int, Update], record: Adapter) -> None:
        """Let a name mean other updates from now on; a block that is open keeps its frame."""
        self.effects.forget(updates.keys())
        with self.route.lock:
            if name in self.adapters:
                self.mixed = None
            self.adapters[name] = Attached(record, updates, Frame.of(updates, name))
            if self.route.bottom.name == name != self.route.merged:
                self.route.set_bottom(self.adapters[name].frame)

    def forget(self, name: str) -> Mapping[int, Update]:
        """A name's updates, which it means no more; a block that is open keeps its frame."""
        with self.route.lock:
            self.mixed = None
            if self.route.bottom.name == name:
                self.route.set_bottom(Frame())
            return self.adapters.pop(name).updates


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, also through wrappers.

    Raises:
        AttachError: this is no model.
    """
    check_model(model)
    found = vars(model).get("_lorakit")
    if found is None:
        found = vars(unwrapped(model)).get("_lorakit")
    return cast("Attachment | None", found)


def check_model(model: object) -> None:
    """Make sure that this is a model.

    Raises:
        AttachError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(
            "a model is a torch.nn.Module, as in model, tokenizer = lk.load_model(…); "
            f"this is a {type(model).__name__}"
        )


def is_compiled(model: nn.Module) -> bool:
    """Whether a model's forward pass goes through torch.compile."""
    return is_compiled_wrapper(model) or compiled_call(model) is not None


def require_attachment(model: nn.Module) -> Attachment:
    """The attachment of a model.

    Raises:
        AttachError: nothing is.
    """
    found = attachment_of(model)
    if found is None:
        raise AttachError("this model has no adapter: attach one first with lk.attach(model, ...)")
    return found


def identity_of(model: nn.Module) -> BaseIdentity | None:
    """The identity of a model's base, which is taken once, before the first adapter."""
    model = unwrapped(model)
    state = attachment_of(model)
    if state is not None:
        return state.base.identity
    original = original_identity(model)
    if original is not None:
        return replace(original, name=model_name(model))
    return identify(model, name=model_name(model), skip=task_heads(model))


def modules_of(model: nn.Module) -> BaseModules:
    """A base's modules by path, and what is remembered of them while they stay the same."""
    model = unwrapped(model)
    found, state = BaseModules(dict(base_modules(model))), attachment_of(model)
    if state is None:
        return found
    if state.modules is None or state.modules.by_path != found.by_path:
        state.modules = found
    return state.modules


def attachment_for(model: nn.Module) -> Attachment:
    """The attachment of a model, which gets one if it has none."""
    model = unwrapped(model)
    state = attachment_of(model)
    if state is None:
        check_no_foreign_layers(model)
        state = Attachment(Base.of(model))
        state.hooks["rows"] = model.register_forward_pre_hook(begin_call, with_kwargs=True)
        state.hooks["effects"] = model.register_forward_hook(end_call, with_kwargs=True)
        for path, stack in stacks_of_blocks(model):
            state.hooks[f"blocks of {path}"] = stack.register_forward_pre_hook(keep_routes)
        head = output_head(model)
        if head is not None:
            state.hooks["head"] = head.register_forward_pre_hook(make_contiguous)
        state.hooks |= guarded_methods(model, _look_at_save)
        model.requires_grad_(False)
        model._lorakit = state  # type: ignore[assignment]
    return state


def check_no_foreign_layers(model: nn.Module) -> None:
    """Refuse a model that holds another library's adapters: their layers would be adapted too.

    Raises:
        AttachError: it does.
    """
    for path, module in base_modules(model):
        modules = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
        library = next((name for name in OTHER_LIBRARIES if name in modules), None)
        if library is not None:
            raise AttachError(
                f"{path or 'the model'} is a {type(module).__name__} of {library}: lorakit "
                "attaches to a base alone. Take the other adapter out (PEFT: model.unload()), or "
                "merge it; lk.Adapter.load reads a folder that PEFT saved"
            )


def _look_at_save(model: nn.Module) -> None:
    name, state = active_name(model), attachment_of(model)
    if name is not None and state is not None and state.route.merged is None:
        warn_of_save(name)


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


def given_or_active(model: nn.Module, name: str | None) -> str:
    """The name of an attached adapter: the one that is given, or that of the one in use.

    Raises:
        AttachError: it is not attached, or none is in use.
    """
    state = require_attachment(model)
    name = active_name(model) if name is None else name
    if name is None:
        raise AttachError(f"no adapter is active: give a name, one of {', '.join(state.adapters)}")
    require_name(state, name)
    return name


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the attached adapters, in the order in which they came."""
    state = attachment_of(model)
    return tuple(state.adapters) if state else ()


def active_name(model: nn.Module) -> str | None:
    """The name of the adapter in use, or None for the base."""
    state = attachment_of(model)
    return None if state is None else state.route.frame.name


def virtual_tokens(model: nn.Module, name: str | None) -> VirtualTokens | None:
    """The virtual tokens that rows of an adapter get; None: it has none, or is none."""
    state = attachment_of(model)
    updates = state.adapters[name].updates.values() if state and name is not None else ()
    return next((each.virtual_tokens for each in updates if each.virtual_tokens), None)


def make_contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An output head's input as contiguous memory: a forward pre-hook.

    transformers gives it the last positions of each row, which are apart in memory, and then torch
    copies the weight once per row, if it is frozen (aten's matmul folds rows otherwise).
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def check_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare a batch with the model's route: a forward pre-hook, without state of its own.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    state = _checked(model, args, kwargs)
    if state is not None and state.compiled:
        call = ModelCall(unwrapped(model), args, kwargs)
        state.effects.prove_all_rows(call, state.route, state.layers)


def begin_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare a batch with the model's route, and look at what layers do: a forward pre-hook.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    state = _checked(model, args, kwargs)
    if state is not None:
        state.effects.begin(ModelCall(model, args, kwargs), state.route, state.layers)


def _checked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attachment | None:
    """The attachment of a model, whose route fits a batch; None: there is none, or code compiles.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    state = None if torch.compiler.is_compiling() else attachment_of(model)
    if state is not None:
        check_batch(state.route, args, kwargs)
    return state


def end_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Compare what layers did with what the route needs: a forward hook.

    Raises:
        RouteError: the rows of a layer's input are not those of the batch.
        AttachError: the model has read the weights of a layer that it has not called.
    """
    state = None if torch.compiler.is_compiling() else attachment_of(model)
    if state is not None:
        state.effects.end(ModelCall(model, args, kwargs), state.route, state.layers)
