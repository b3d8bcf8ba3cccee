"""Put an adapter into a model, say which one is in use, read it back, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.adapter import Adapter
from lorakit.config import LoRAConfig
from lorakit.errors import AttachError, did_you_mean
from lorakit.matching import Plan, fit, plan, short_names
from lorakit.methods.checkpointing import adapted_blocks, let_input_require_grad
from lorakit.methods.layer import (
    AdaptedLayer,
    Changes,
    Route,
    Update,
    adapted_layers,
    adopt,
    bank_key,
    release,
    update_of,
)
from lorakit.methods.lora import LoRAUpdate, LowRank, fresh_a, parameter_shapes
from lorakit.methods.module_copy import ModuleCopy
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
    updates: dict[str, dict[int, Update]] = field(default_factory=dict)
    """What each adapter does, by its name and the layer's number."""
    inputs: dict[str, str] = field(default_factory=dict)
    """A word for the input of those layers that read the same as their neighbours, by path."""
    mixed: tuple[Any, Changes] | None = None
    """The latest mixed batch: what it was made from, and what it does to each layer."""

    def activate(self, name: str | None) -> None:
        """Make one adapter, or the base, answer for all rows."""
        plain = name is None or name == self.route.merged
        self.route.changes = None if plain else self.updates[cast(str, name)]
        self.route.active = name


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return what is attached to a model, also through torch.compile's or DDP's wrapper."""
    inner = model.module if hasattr(model, "module") else model
    return cast("Attachment | None", getattr(inner, "_lorakit", None))


def require_attachment(model: nn.Module) -> Attachment:
    """Return what is attached to a model.

    Raises:
        AttachError: nothing is.
    """
    found = attachment_of(model)
    if found is None:
        raise AttachError("this model has no adapter: attach one first with lk.attach(model, ...)")
    return found


def attach(
    model: nn.Module,
    what: LoRAConfig | Adapter,
    *,
    name: str = "default",
    trainable: bool | None = None,
    allow_other_base: bool = False,
) -> Plan:
    """Put a fresh adapter, or a saved one, into a model, and make it the active one.

    The model stays the same object with the same parameters; only `detach` and this know that some
    of its layers look for updates. All checks come before the first change.

    Args:
        model: a plain module; one that has adapters already gets one more.
        what: settings for a fresh adapter (A random, B zero: the model answers as before), or an
            `Adapter`.
        name: what to call it in this model.
        trainable: whether A, B, biases and copies take gradients. None: a fresh one does.
        allow_other_base: accept an adapter whose base has other weights.

    Returns:
        The match table: `print` it.

    Raises:
        AttachError: the name is taken, or an adapter is merged.
        TargetError: a target of the settings matches nothing.
        AdapterFileError: the adapter does not fit this model; every problem is listed.
    """
    state = attachment_of(model)
    if state is not None:
        _check_free(state, name)
    identity = (
        state.identity if state else identify(model, name=model_name(model), skip=task_heads(model))
    )
    if isinstance(what, Adapter):
        fitted = fit(model, what, identity, allow_other_base=allow_other_base)
        updates = _build(model, fitted, what.config, what.tensors)
        # Another tool's file may not say what kind of layer it adapts; the model does.
        record = replace(what, tensors={}, sites=fitted.sites)
    else:
        fitted = plan(model, what)
        updates = _build(model, fitted, what, None)
        record = Adapter(
            config=what,
            sites=fitted.sites,
            tensors={},
            copied_modules=fitted.copies,
            target_modules=short_names(model, fitted.sites),
            base=identity,
        )
    train = not isinstance(what, Adapter) if trainable is None else trainable
    install(model, updates, name, record, identity, trainable=train)
    require_attachment(model).activate(name)
    return fitted


def _check_free(state: Attachment, name: str) -> None:
    if name in state.adapters:
        raise AttachError(
            f"an adapter called {name!r} is attached already: give another name, or detach it first"
        )
    if state.route.merged is not None:
        raise AttachError("an adapter is merged into this model: lk.unmerge(model) first")


def _build(
    model: nn.Module, fitted: Plan, config: LoRAConfig, tensors: Mapping[str, Tensor] | None
) -> dict[str, Update]:
    """Return the update of each touched module, by path; the model is not changed."""
    updates: dict[str, Update] = {}
    parts: dict[str, dict[str, LowRank]] = {}
    for match in fitted.matches:
        site, layer = match.site, model.get_submodule(match.site.path)
        device = cast(Tensor, layer.weight).device
        shape_a, shape_b = parameter_shapes(layer, site)
        if tensors is None:
            dtype = getattr(torch, config.dtype)
            a = fresh_a(shape_a, layer, config) if device.type != "meta" else torch.empty(shape_a)
            a, b = a.to(device, dtype), torch.zeros(shape_b, device=device, dtype=dtype)
        else:
            a = tensors[f"{site.name}.lora_a"].to(device, copy=True)
            b = tensors[f"{site.name}.lora_b"].to(device, copy=True)
        parts.setdefault(site.path, {})[site.role or "whole"] = LowRank(site, config, a, b)
    for path in dict.fromkeys([*parts, *fitted.biases]):
        bias = _starting_bias(model, path, config, tensors) if path in fitted.biases else None
        updates[path] = LoRAUpdate(parts.get(path, {}), bias)
    for path in fitted.copies:
        made = ModuleCopy(model.get_submodule(path), getattr(torch, config.dtype))
        if tensors is not None:
            made.fill(tensors, path)
        updates[path] = made
    return updates


def _starting_bias(
    model: nn.Module, path: str, config: LoRAConfig, tensors: Mapping[str, Tensor] | None
) -> Tensor:
    base = cast(Tensor, model.get_submodule(path).bias).detach()
    if tensors is None:
        return base.to(getattr(torch, config.dtype), copy=True)
    return tensors[f"{path}.bias"].to(base.device, copy=True)


def install(
    model: nn.Module,
    updates: Mapping[str, Update],
    name: str,
    record: Adapter,
    identity: BaseIdentity | None,
    *,
    trainable: bool,
) -> None:
    """Give a model's layers the updates of one adapter, by path; which is active stays as it is.

    The adapter counts from the last line on, which is one assignment: forward passes that run in
    another thread see all of it or nothing.
    """
    state = attachment_of(model)
    if state is None:
        frozen = {path: p.requires_grad for path, p in base_parameters(model)}
        state = Attachment(route=Route(), identity=identity, frozen=frozen)
        state.inputs = shared_inputs(model)
        model.requires_grad_(False)
        model._lorakit = state  # type: ignore[assignment]
    by_number: dict[int, Update] = {}
    for path, update in updates.items():
        update.requires_grad_(trainable).train(model.training)
        layer = adopt(model.get_submodule(path), state.route, reads=state.inputs.get(path, path))
        layer.adapter_bank[bank_key(name)] = update
        state.layers[layer.adapter_number] = layer
        by_number[layer.adapter_number] = update
    for path, block in adapted_blocks(model) if trainable else ():
        if path not in state.hooks:
            state.hooks[path] = block.register_forward_pre_hook(let_input_require_grad)
    state.adapters[name] = record
    state.updates[name] = by_number


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all, out of a model; after the last, the base is back bit for bit.

    A merged adapter is unmerged first. The base's parameters get back their requires_grad.

    Raises:
        AttachError: nothing is attached, or nothing of that name.
    """
    state = require_attachment(model)
    if name is not None:
        require_name(state, name)
    if state.route.merged is not None and name in (None, state.route.merged):
        restore_pristine(model, state)
    for each in list(state.adapters) if name is None else [name]:
        remove(state, each)
    for number, layer in list(state.layers.items()):
        if not layer.adapter_bank:
            release(state.layers.pop(number))
    if not state.adapters:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(state.frozen.get(path, parameter.requires_grad))
        for hook in state.hooks.values():
            hook.remove()
        del model._lorakit


def remove(state: Attachment, name: str) -> None:
    """Take one adapter out; its layers stay adapted, for others to come."""
    for number in state.updates.pop(name):
        state.layers[number].adapter_bank.pop(bank_key(name))
    del state.adapters[name]
    state.mixed = None
    if state.route.active == name:
        state.activate(None)


def restore_pristine(model: nn.Module, state: Attachment) -> None:
    """Copy every pristine weight back, retie what was untied, and forget the merge."""
    for path, parameters in state.pristine.items():
        module = model.get_submodule(path)
        for name, pristine in parameters.items():
            if isinstance(pristine, nn.Parameter):
                set_parameter(module, name, pristine)
            else:
                weight = pristine if isinstance(pristine, Tensor) else pristine.read()
                module.get_parameter(name).data.copy_(weight)
    state.pristine.clear()
    state.route.merged = None
    state.activate(state.route.active)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one that a dotted name means."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


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


def extract(model: nn.Module, name: str | None = None) -> Adapter:
    """Return an attached adapter as it is now, with its tensors copied to the CPU.

    Args:
        model: a model with adapters.
        name: which; None: the active one.

    Raises:
        AttachError: there is none.
    """
    state = require_attachment(model)
    name = active_name(model) if name is None else name
    if name is None:
        raise AttachError(f"no adapter is active: give a name, one of {', '.join(state.adapters)}")
    require_name(state, name)
    tensors = {
        n: p.detach().to("cpu", copy=True).contiguous() for n, p in adapter_parameters(model, name)
    }
    return replace(state.adapters[name], tensors=tensors)


def adapter_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield one adapter's parameters under their names in an `Adapter`."""
    for path, layer in adapted_layers(model):
        update = update_of(layer, name)
        if isinstance(update, ModuleCopy):
            for inner, parameter in update.copy.named_parameters():
                yield f"{path}.{inner}", parameter
        elif isinstance(update, LoRAUpdate):
            for part in update.parts.values():
                assert isinstance(part, LowRank)
                yield f"{part.site.name}.lora_a", part.lora_a
                yield f"{part.site.name}.lora_b", part.lora_b
            if update.bias is not None:
                yield f"{path}.bias", update.bias
