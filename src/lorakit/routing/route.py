"""Which adapter each row of a batch uses: one for all, one per row, or several to a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorakit.attachment.state import Attachment, require_attachment, require_name
from lorakit.errors import MergeError, RouteError, did_you_mean
from lorakit.kernels import choice
from lorakit.layers.layer import Operations
from lorakit.routing.batch import Batch, Combination, Updates
from lorakit.routing.compiled_batch import static_operations
from lorakit.routing.stacked_lora import mixed_operations
from lorakit.upstream.private_names import write_count

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
    rows = combinations(names)
    with state.lock:
        check_names(rows, state.adapters)
        updates = {name: state.updates[name] for row in rows for name, _ in row}
    rows = [tuple(term for term in row if term[1]) for row in rows]
    if state.route.merged is not None:
        raise RouteError(
            f"adapter {state.route.merged!r} is merged into the weights, so no row can have "
            "another, or the base: lk.unmerge(model) first"
        )
    operations, active = _changes(state, updates, rows, next(model.parameters()).device)
    length = None if _is_single(names) else len(rows)
    with state.routed(operations, active, length):
        yield


def combinations(names: Choice | Sequence[Choice]) -> list[Combination]:
    """Return what each row uses; one entry where one choice serves all rows.

    Raises:
        RouteError: a choice is neither a name, None, nor names with numbers.
    """
    rows: Any = [names] if _is_single(names) else names
    return [_combination(each, row) for row, each in enumerate(rows)]


def _is_single(names: Choice | Sequence[Choice]) -> bool:
    return names is None or isinstance(names, str | Mapping)


def _combination(choice: Choice, row: int) -> Combination:
    if choice is None:
        return ()
    if isinstance(choice, str):
        return ((choice, 1.0),)
    try:
        return tuple(sorted((name, float(weight)) for name, weight in choice.items()))
    except (AttributeError, TypeError, ValueError):
        raise RouteError(
            f"row {row} asks for {choice!r}: give a name, None for the base, or a dictionary of "
            "names and strengths"
        ) from None


def check_names(rows: Sequence[Combination], known: Mapping[str, Any]) -> None:
    """Check the names and strengths of a route.

    Raises:
        RouteError: with every name that is not known, and every strength that is not finite.
    """
    problems: dict[str, None] = {}
    if not rows:
        problems["no rows: give a choice for each row of the batch, or one for all"] = None
    for row, combination in enumerate(rows):
        for name, weight in combination:
            if name not in known:
                problems[f"no such adapter: {name!r}{did_you_mean(name, known)}"] = None
            elif not math.isfinite(weight):
                problems[f"row {row} asks for {name!r} at strength {weight}"] = None
    if problems:
        attached = f"; attached: {list(known)}"
        raise RouteError("; ".join(problems) + attached)


def _changes(
    state: Attachment, updates: Updates, rows: Sequence[Combination], device: torch.device
) -> tuple[Operations | None, str | None]:
    """Return what is done to each layer, and the adapter's name where one serves all rows."""
    if all(combination == rows[0] for combination in rows):
        if not rows[0]:
            return None, None
        if len(rows[0]) == 1 and rows[0][0][1] == 1 and not state.compiled:
            name = rows[0][0][0]
            return updates[name], name
        # Rows that all want the same need no telling apart, however many there are.
        rows = rows[:1]
    else:
        _check_rows_apart(state, updates)
    return _mixed(state, updates, Batch.of(rows), device), None


def _check_rows_apart(state: Attachment, updates: Updates) -> None:
    """Refuse rows of their own where an adapter changes what is computed once for all of them.

    Raises:
        RouteError: with the first such layer.
    """
    numbers = {number for of_name in updates.values() for number in of_name}
    found = sorted(path for n in numbers if (path := state.paths[n]) in state.shared_by_batch)
    if found:
        raise RouteError(
            f"the rows cannot differ: {len(found)} adapted layers, such as {found[0]}, have an "
            "input all rows share; route the whole batch to one adapter, or leave them out"
        )


def _mixed(state: Attachment, updates: Updates, batch: Batch, device: torch.device) -> Operations:
    """A mixed batch's changes: those of the last one, if nothing is new since."""
    names = dict.fromkeys(name for combination in batch.combinations for name, _ in combination)
    used = {name: updates[name] for name in names}
    parameters = [p for ups in used.values() for u in ups.values() for p in u.parameters()]
    token = (batch, device, choice.fast(), _fingerprint(parameters))
    if state.mixed is None or state.mixed[0] != token:
        trains = any(p.requires_grad for p in parameters)
        # The unchanging form holds copies of A and B, which would get no gradients.
        make = static_operations if state.compiled and not trains else mixed_operations
        operations = make(dict(state.layers), used, batch, device)
        # While the memory is held, nothing else can lie at its address.
        memory = [p.untyped_storage() for p in parameters]
        state.mixed = (token, operations, memory)
        return operations
    return state.mixed[1]


def _fingerprint(parameters: Sequence[nn.Parameter]) -> tuple[Any, ...]:
    """Return what differs once a parameter was written, replaced, moved, frozen or unfrozen.

    What is written through `.data` in place differs in nothing that torch would tell.
    """
    return tuple(
        # Torch counts no writes to what was made in inference mode: that differs each time.
        (p.data_ptr(), object() if p.is_inference() else write_count(p), p.requires_grad)
        for p in parameters
    )
