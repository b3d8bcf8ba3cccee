"""Which adapter each row of a batch uses: one for all, one per row, or several to a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attachment import Attachment, require_attachment, require_name, unwrapped
from lorakit.errors import MergeError, RouteError, did_you_mean
from lorakit.methods.layer import Changes
from lorakit.methods.mixed import Batch, Blend, mixed_changes
from lorakit.methods.static import static_changes

Choice = str | Mapping[str, float] | None
"""What a row uses: an adapter, several with their strengths, or None for the base."""


def switch(model: nn.Module, name: str | None) -> None:
    """Make one adapter, or with None the base, answer for the whole batch from now on.

    This is one assignment; no weight moves.

    Raises:
        AttachError: there is no adapter of that name.
        MergeError: another adapter is merged into the weights.
    """
    state = require_attachment(model)
    if name is not None:
        require_name(state, name)
    if state.route.merged not in (None, name):
        raise MergeError(
            f"adapter {state.route.merged!r} is merged into the weights: lk.unmerge(model) first"
        )
    state.activate(name)


@contextmanager
def route(model: nn.Module, names: Choice | Sequence[Choice]) -> Iterator[None]:
    """Use one choice for all rows, or one for each row of the batch, inside a block.

    A choice is an adapter's name, None for the base, or several names with strengths: the row gets
    the sum of their updates, each times its strength. What was in use before is restored
    afterwards, also after an error and when nested. `generate` with beams or several answers to a
    row makes several rows of one: all of them use that row's choice.

    Args:
        model: a model with adapters.
        names: one choice, or as many as the batch has rows.

    Raises:
        RouteError: a name is not attached, a strength is no number, an adapter is merged into the
            weights, or (in the forward pass) the batch has another number of rows.
    """
    state = require_attachment(model)
    rows = blends(names)
    check_names(rows, state.adapters)
    if state.route.merged is not None:
        raise RouteError(
            f"adapter {state.route.merged!r} is merged into the weights, so no row can have "
            "another, or the base: lk.unmerge(model) first"
        )
    changes, active = _changes(state, rows, next(model.parameters()).device)
    length = None if _is_single(names) else len(rows)
    with state.routed(changes, active), _checked(model, length):
        yield


def blends(names: Choice | Sequence[Choice]) -> list[Blend]:
    """Return what each row uses; one entry where one choice serves all rows."""
    rows: Any = [names] if _is_single(names) else names
    return [_blend(each) for each in rows]


def _is_single(names: Choice | Sequence[Choice]) -> bool:
    return names is None or isinstance(names, str | Mapping)


def _blend(choice: Choice) -> Blend:
    if choice is None:
        return ()
    if isinstance(choice, str):
        return ((choice, 1.0),)
    return tuple(sorted((name, float(strength)) for name, strength in choice.items() if strength))


def check_names(rows: Sequence[Blend], known: Mapping[str, Any]) -> None:
    """Check the names and strengths of a route.

    Raises:
        RouteError: with every name that is not known, and every strength that is not finite.
    """
    problems: dict[str, None] = {}
    if not rows:
        problems["no rows: give a choice for each row of the batch, or one for all"] = None
    for row, blend in enumerate(rows):
        for name, strength in blend:
            if name not in known:
                problems[f"no such adapter: {name!r}{did_you_mean(name, known)}"] = None
            elif not math.isfinite(strength):
                problems[f"row {row} asks for {name!r} at strength {strength}"] = None
    if problems:
        attached = f"; attached: {list(known)}"
        raise RouteError("; ".join(problems) + attached)


def _changes(
    state: Attachment, rows: Sequence[Blend], device: torch.device
) -> tuple[Changes | None, str | None]:
    """Return what is done to each layer, and the adapter's name where one serves all rows."""
    if all(blend == rows[0] for blend in rows):
        if not rows[0]:
            return None, None
        if len(rows[0]) == 1 and rows[0][0][1] == 1 and not state.compiled:
            name = rows[0][0][0]
            return state.updates[name], name
        # Rows that all want the same need no telling apart, however many there are.
        rows = rows[:1]
    return _mixed(state, Batch.of(rows), device), None


def _mixed(state: Attachment, batch: Batch, device: torch.device) -> Changes:
    """Return a mixed batch's changes: those of the last one, if nothing is new since."""
    names = dict.fromkeys(name for blend in batch.blends for name, _ in blend)
    used = {name: state.updates[name] for name in names}
    token = (batch, device, tuple(_fingerprint(updates) for updates in used.values()))
    if state.mixed is None or state.mixed[0] != token:
        # The unchanging form holds copies, through which no gradient comes back.
        trains = any(p.requires_grad for ups in used.values() for p in _parameters(ups))
        make = static_changes if state.compiled and not trains else mixed_changes
        state.mixed = (token, make(state.layers, used, batch, device))
    return state.mixed[1]


def _fingerprint(updates: Mapping[int, nn.Module]) -> tuple[Any, ...]:
    """Return what differs once a parameter was written, replaced, moved, frozen or unfrozen."""
    return tuple((p.data_ptr(), p._version, p.requires_grad) for p in _parameters(updates))


def _parameters(updates: Mapping[int, nn.Module]) -> Iterator[nn.Parameter]:
    return (p for update in updates.values() for p in update.parameters())


@contextmanager
def _checked(model: nn.Module, rows: int | None) -> Iterator[None]:
    """Compare each batch with the route's length, inside a block."""
    if rows is None:
        yield
        return

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        found = _batch_size(args, kwargs)
        # generate repeats rows, and can be told by the cache that it brings.
        repeats = kwargs.get("past_key_values") is not None or "encoder_outputs" in kwargs
        if found is not None and found != rows and not (repeats and found % rows == 0):
            raise RouteError(f"the route is for {rows} rows, but the batch has {found} rows")

    handle = unwrapped(model).register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the rows of a model's first tensor."""
    named = (kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    tensors = (x for x in (*args, *named, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
    return next((x.shape[0] for x in tensors), None)
