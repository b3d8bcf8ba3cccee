"""Put an adapter into a model, say which one is in use, read it back, and take it out again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.attachment.older_names import with_names_of
from lorakit.attachment.original_weights import restore_module
from lorakit.attachment.plan import Plan, fresh_plan, with_singular_vectors
from lorakit.attachment.state import (
    Attachment,
    attachment_for,
    attachment_of,
    check_model,
    check_no_foreign_layers,
    given_or_active,
    identity_of,
    modules_of,
    require_attachment,
    require_name,
)
from lorakit.attachment.verify import saved_plan
from lorakit.config.methods import LoRAConfig, MethodConfig
from lorakit.errors import AttachError
from lorakit.layers.adapted_layer import bank_key, restore
from lorakit.layers.checkpointing import forget_routes, stacks_of_blocks
from lorakit.layers.operation import Update
from lorakit.layers.route import Frame
from lorakit.methods.component import Materials
from lorakit.methods.lora.eva import input_singular_vectors
from lorakit.methods.lora.experts import low_ranks_of
from lorakit.methods.lora.lora import parameter_shapes
from lorakit.methods.lora.pissa import join_frozen_factors
from lorakit.methods.prompt.hooks import HOOKS, OF_ENCODER, watch
from lorakit.models.base import base_modules, base_parameters, unwrapped
from lorakit.models.roles import shared_inputs, task_heads

What = MethodConfig | Sequence[MethodConfig] | AdapterSource
"""What can be attached: a fresh adapter, by settings, or a saved one."""


def attach(
    model: nn.Module,
    what: What,
    *,
    name: str = "default",
    trainable: bool | None = None,
    allow_other_base: bool = False,
    data: Iterable[Mapping[str, Tensor]] | None = None,
) -> Plan:
    """Put a fresh adapter, or a saved one, into a model, and make it the active one.

    The model stays the same object with the same parameters; only `detach` and this know that some
    of its layers look for updates. All checks come before the first change.

    Args:
        model: a plain module; one that has adapters already gets one more.
        what: settings of a method for a fresh adapter (LoRA's has A random and B zero: the model
            answers as before), those of several methods, an `Adapter`, its folder, or its hub id.
        name: what to call it in this model.
        trainable: whether A, B, biases and copies take gradients. None: a fresh one does.
        allow_other_base: accept an adapter whose base has other weights.
        data: batches that the model takes, for LoRA's init eva; labels in them are not looked at.

    Returns:
        The match table: `print` it.

    Raises:
        AttachError: the name is taken, an adapter is merged, or data is given or missing against
            the settings.
        TargetError: a target of the settings matches nothing.
        AdapterFileError: the adapter does not fit this model; every problem is listed.

    Examples:
        >>> plan = lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"]))
        >>> plan.parameters
        460800
        >>> plan = lk.attach(model, "out/sql", name="sql")  # a saved one beside it
    """
    state, what = attachment_of(model), _what(what, model)
    train = not isinstance(what, Adapter) if trainable is None else trainable
    _check_replicas(model, train)
    model = unwrapped(model)
    if state is None:
        check_no_foreign_layers(model)
    else:
        _check_free(state, name)
    _check_data(what, data)
    if isinstance(what, Adapter):
        found, updates, record = fit_and_build(model, what, allow_other_base=allow_other_base)
    else:
        found = fresh_plan(model, what)
        if data is not None:
            found = _with_singular_vectors(model, state, found, data)
        updates = found.updates(Materials(modules=modules_of(model).by_path))
        record = found.adapter(model, identity_of(model))
    install(model, updates, name, record, trainable=train).activate(name)
    return found


def plan(
    model: nn.Module,
    what: What,
    *,
    allow_other_base: bool = False,
) -> Plan:
    """What `attach(model, what)` would put into a model; nothing is changed.

    Args:
        model: a plain module, or one with adapters.
        what: settings of one method or of several, an `Adapter`, its folder, or its hub id.
        allow_other_base: accept an adapter whose base has other weights.

    Raises:
        ConfigError: the methods cannot be combined.
        TargetError: a name in the settings matches nothing, or a layer twice; or the model lacks
            what a method needs.
        AdapterFileError: the adapter does not fit this model; every problem is listed.

    Examples:
        >>> lk.plan(model, lk.LoRAConfig(rank=8, targets="all-linear")).parameters
        2442240
        >>> lk.plan(model, "out/places").parameters  # does it fit?
        460800
    """
    check_model(model)
    model, what = unwrapped(model), _what(what, model)
    if isinstance(what, Adapter):
        base, identity = modules_of(model), identity_of(model)
        what = with_names_of(base, what)
        return saved_plan(base, what, identity, allow_other_base=allow_other_base)
    return fresh_plan(model, what)


def _what(given: object, model: nn.Module) -> MethodConfig | Sequence[MethodConfig] | Adapter:
    """The settings or the adapter that were given, the adapter read for the model.

    Raises:
        AttachError: it is something else.
        AdapterFileError: there is no such adapter, or its files cannot be used.
    """
    if isinstance(given, str | os.PathLike):
        return Adapter.load(given, base=model)
    if isinstance(given, Adapter | MethodConfig):
        return given
    if isinstance(given, Sequence) and all(isinstance(each, MethodConfig) for each in given):
        return given
    raise AttachError(
        "what is attached are settings such as lk.LoRAConfig(rank=8), those of several methods in "
        "a list, an Adapter, its folder, or its hub id; found "
        f"{given!r:.60}, a {type(given).__name__}"
    )


def _check_free(state: Attachment, name: str) -> None:
    if name in state.adapters:
        raise AttachError(
            f"an adapter called {name!r} is attached already: give another name, or detach it first"
        )
    if state.route.merged is not None:
        raise AttachError("an adapter is merged into this model: lk.unmerge(model) first")


def _check_replicas(model: nn.Module, train: bool) -> None:
    """Refuse to train what other processes would not hear of.

    Raises:
        AttachError: the wrapper has noted already which parameters' gradients it averages.
    """
    group = getattr(model, "process_group", None)
    if train and group is not None and group.size() > 1:
        raise AttachError(
            f"{type(model).__name__} averages the gradients of the parameters that it was given: "
            "attach the adapter to the model first, and wrap it then"
        )


def _check_data(what: object, data: object) -> None:
    """Compare the data that was given with what the settings ask for.

    Raises:
        AttachError: it is missing, or nothing looks at it.
    """
    each = what if isinstance(what, Sequence) else [what]
    wanted = any(isinstance(one, LoRAConfig) and one.init == "eva" for one in each)
    if wanted and data is None:
        raise AttachError(
            "init is eva, which looks at data: give batches, as in lk.attach(model, config, data=…)"
        )
    if data is not None and not wanted:
        raise AttachError("data is given, but nothing looks at it: only LoRA's init eva does")


def _with_singular_vectors(
    model: nn.Module,
    state: Attachment | None,
    found: Plan,
    data: Iterable[Mapping[str, Tensor]],
) -> Plan:
    """A plan whose low-rank updates start from what their layers read of some data."""
    paths = list(dict.fromkeys(site.path for site in found.sites))
    with nullcontext() if state is None else state.route.block(Frame()):
        vectors = input_singular_vectors(model, paths, shared_inputs(model), data)
    return with_singular_vectors(model, found, vectors)


def fit_and_build(
    model: nn.Module,
    adapter: Adapter,
    *,
    allow_other_base: bool = False,
    other_heads: bool = False,
    copy: bool = True,
) -> tuple[Plan, dict[str, Update], Adapter]:
    """Verify a saved adapter against a model and make its updates; the model is not changed.

    Args:
        model: the base, with or without adapters.
        adapter: what is to fit.
        allow_other_base: accept one whose base has other weights.
        other_heads: accept full copies of a task's head with another number of classes.
        copy: leave the adapter's own tensors alone; else the model may keep them.

    Returns:
        The plan, the updates by module path, and the adapter without its tensors.

    Raises:
        AdapterFileError: it does not fit; every problem is listed.
    """
    base = modules_of(model)
    adapter = with_names_of(base, adapter)
    found = saved_plan(
        base,
        adapter,
        identity_of(model),
        allow_other_base=allow_other_base,
        other_heads=task_heads(model) if other_heads else (),
    )
    materials = Materials(modules=base.by_path, tensors=adapter.tensors, copy=copy)
    # Another tool's file may not say what kind of layer it adapts; the model does.
    return found, found.updates(materials), replace(adapter, tensors={}, sites=found.sites)


def install(
    model: nn.Module,
    updates: Mapping[str, Update],
    name: str,
    record: Adapter,
    *,
    trainable: bool,
) -> Attachment:
    """Give a model's layers the updates of one adapter, by path; which is active stays as it is.

    What the name meant before is removed. The new updates count from one assignment on, so that a
    forward pass in another thread sees all of them or none.
    """
    state, key = attachment_for(model), bank_key(name)
    by_number: dict[int, Update] = {}
    for path, update in updates.items():
        if trainable:
            update.let_train()
        if model.training:
            update.train()
        layer = state.convert(model, path)
        layer.adapter_bank[key] = update
        by_number[layer.adapter_number] = update
        if update.virtual_tokens and HOOKS[0] not in state.hooks:
            state.hooks |= watch(model, path)
    before = state.adapters.get(name)
    stale = () if before is None else before.updates.keys() - by_number.keys()
    state.replace(name, by_number, record)
    for number in stale:
        state.layers[number].adapter_bank.pop(key)
    return state


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all, out of a model; after the last, the base is back bit for bit.

    A merged adapter is unmerged first. The base's parameters get back their requires_grad.

    Raises:
        AttachError: nothing is attached, or nothing of that name.

    Examples:
        >>> plan = lk.attach(model, "out/places")
        >>> lk.detach(model)
    """
    model = unwrapped(model)
    state = require_attachment(model)
    if name is not None:
        require_name(state, name)
    if state.route.merged is not None and name in (None, state.route.merged):
        restore_original_weights(model, state)
    for each in list(state.adapters) if name is None else [name]:
        remove(state, each)
    for number in state.idle():
        restore(state.layers.pop(number))
    kept = (update for each in state.adapters.values() for update in each.updates.values())
    if not any(update.virtual_tokens for update in kept):
        for each in (*HOOKS, *OF_ENCODER):
            if each in state.hooks:
                state.hooks.pop(each).remove()
    if not state.adapters:
        _give_back(model, state)


def _give_back(model: nn.Module, state: Attachment) -> None:
    """Leave a model without adapters as it was before the first one."""
    for path, parameter in base_parameters(model):
        parameter.requires_grad_(state.base.requires_grad.get(path, parameter.requires_grad))
    for hook in state.hooks.values():
        hook.remove()
    for _, stack in stacks_of_blocks(model):
        forget_routes(stack)
    del model._lorakit


def remove(state: Attachment, name: str) -> None:
    """Take one adapter out; its layers stay adapted, and an open route keeps its updates."""
    for number in state.forget(name):
        state.layers[number].adapter_bank.pop(bank_key(name))


def restore_original_weights(model: nn.Module, state: Attachment) -> None:
    """Copy every original weight back, tie again what the merge untied, and end the merge."""
    for path, weights in state.original_weights.items():
        restore_module(model, path, weights)
    state.original_weights.clear()
    if state.route.merged is not None:
        state.route.set_bottom(state.adapters[state.route.merged].frame)


def extract(model: nn.Module, name: str | None = None) -> Adapter:
    """An attached adapter as it is now, with its tensors copied to the CPU.

    Args:
        model: a model with adapters.
        name: which; None: the active one.

    Raises:
        AttachError: there is none, or its layers were replaced or resized since it was attached.

    Examples:
        >>> plan = lk.attach(model, lk.LoRAConfig(rank=4))
        >>> folder = lk.extract(model).save("out/mine")
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'lorakit.json']
    """
    state, name = require_attachment(model), given_or_active(model, name)
    check_in_place(model, state, name)
    tensors = {
        n: p.detach().to("cpu", copy=True).contiguous() for n, p in adapter_parameters(model, name)
    }
    record, updates = state.adapters[name].record, state.adapters[name].updates
    shared = {
        n: values.detach().to("cpu", copy=True).contiguous()
        for number, update in updates.items()
        for n, values in update.shared_tensors(state.layers[number].adapter_path)
    }
    return replace(record, tensors={**join_frozen_factors(record.sites, tensors), **shared})


def check_in_place(model: nn.Module, state: Attachment, name: str) -> None:
    """Compare the layers that an adapter changes with those that it was attached to.

    Raises:
        AttachError: one was replaced in the model, or has another shape now; all are listed.
    """
    # Not by path: torch.compile and others wrap a model, and then its paths begin otherwise.
    modules, problems = {module for _, module in base_modules(model)}, []
    for number, update in state.adapters[name].updates.items():
        layer, path = state.layers[number], state.layers[number].adapter_path
        parts = low_ranks_of(update)
        if layer not in modules:
            problems.append(f"{path}  is another module now, which the adapter does not change")
        elif any((p.a.shape, p.b.shape) != parameter_shapes(layer, p.site) for p in parts):
            problems.append(f"{path}  has another size now than A and B of the adapter")
    if problems:
        raise AttachError.listing(
            f"the model was changed after adapter {name!r} was attached to it", problems
        )


def adapter_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield one adapter's parameters under their names in an `Adapter`.

    Ranks that do not train have names of their own (`methods/lora/pissa.py`).
    """
    state = require_attachment(model)
    attached = state.adapters.get(name)
    for number, update in () if attached is None else attached.updates.items():
        yield from update.named_tensors(state.layers[number].adapter_path)
