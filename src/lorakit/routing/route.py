"""Which adapter each row of a batch uses: one for all, one per row, or several to a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorakit.attachment.state import Attached, Attachment, require_attachment, require_name
from lorakit.errors import MergeError, RouteError
from lorakit.kernels import choice
from lorakit.layers.route import Frame
from lorakit.models.base import device_of
from lorakit.routing.choices import Choice, RowChoices, UpdatesByName
from lorakit.routing.compiled_batch import static_operations
from lorakit.routing.flattened import RowsOfTokens, flattened, of_tokens
from lorakit.routing.stacked_lora import mixed_operations
from lorakit.upstream.private_names import write_count


def switch(model: nn.Module, name: str | None) -> None:
    """Make one adapter, or with None the base, answer for the whole batch from now on.

    This is one assignment; no weight moves.

    Raises:
        AttachError: there is no adapter of that name.
        MergeError: another adapter is merged into the weights.

    Examples:
        >>> plan = lk.attach(model, "out/places", name="places")
        >>> plan = lk.attach(model, "out/sql", name="sql")
        >>> lk.switch(model, "places")
        >>> lk.switch(model, None)  # the base answers
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
def route(
    model: nn.Module, names: Choice | Sequence[Choice], *, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Use one choice for all rows, or one for each row of the batch, inside a block.

    A choice is an adapter's name, None for the base, or several names with weights: the row gets
    the sum of their updates, each times its weight. What was in use before is restored
    afterwards, also after an error and when nested. `generate` with beams or several answers to a
    row makes several rows of one: all of them use that row's choice.

    Args:
        model: a model with adapters.
        names: one choice, or as many as the batch has rows.
        lengths: the batch is one row of several requests, one after the other, and these are their
            tokens: a choice for each of them. That they do not attend to each other is up to the
            caller's position ids and mask.

    Raises:
        RouteError: a name is not attached, a weight is no number, an adapter is merged into the
            weights, or (in the forward pass) the batch has another number of rows or tokens.

    Examples:
        >>> plan = lk.attach(model, "out/places", name="places")
        >>> plan = lk.attach(model, "out/sql", name="sql")
        >>> batch = tokenizer(["The sea"] * 3, return_tensors="pt")
        >>> with lk.route(model, ["places", None, {"places": 0.5, "sql": 0.5}]):
        ...     logits = model(**batch).logits
    """
    state = require_attachment(model)
    with route_rows(model, RowChoices.of(names, state.adapters), lengths=lengths):
        yield


@contextmanager
def route_rows(
    model: nn.Module, choices: RowChoices, *, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Have each row of a batch use what was chosen for it, inside a block (see `route`).

    Raises:
        RouteError: an adapter is merged into the weights, or the rows cannot differ.
    """
    state = require_attachment(model)
    try:
        with state.route.lock:
            used = {name: state.adapters[name] for name in choices.names}
    except KeyError as error:
        raise RouteError(f"adapter {error} was detached meanwhile") from None
    if state.route.merged is not None:
        raise RouteError(
            f"adapter {state.route.merged!r} is merged into the weights, so no row can have "
            "another, or the base: lk.unmerge(model) first"
        )
    device = device_of(model)
    if lengths is None:
        frame = replace(_frame(state, used, choices, device), rows=choices.rows)
    else:
        frame = replace(_flattened(state, used, of_tokens(choices, lengths), device), rows=1)
    with state.route.block(replace(frame, choices=choices.of_each)):
        yield


def _flattened(
    state: Attachment, used: Mapping[str, Attached], tokens: RowChoices, device: torch.device
) -> Frame:
    """The frame for the tokens of one row."""
    if state.compiled:
        raise RouteError("a compiled model takes no lengths: give a row to each request")
    frame = _frame(state, used, tokens, device)
    count = len(tokens.index_of_row)
    return frame if count == 1 else flattened([RowsOfTokens(frame, rows=count, tokens=1)])


def _frame(
    state: Attachment, used: Mapping[str, Attached], choices: RowChoices, device: torch.device
) -> Frame:
    """The frame for the rows of a batch, which are on a device."""
    if len(choices.index_of_row) > 1:
        _check_rows_apart(state, used.values())
    if not choices.combinations:
        return Frame()
    if choices.only_adapter is not None and not state.compiled:
        return used[choices.only_adapter].frame
    names = dict.fromkeys(name for combination in choices.combinations for name, _ in combination)
    return _mixed(state, {name: used[name].updates for name in names}, choices, device)


def _check_rows_apart(state: Attachment, used: Iterable[Attached]) -> None:
    """Refuse rows of their own where an adapter changes what is computed once for all of them.

    Raises:
        RouteError: with the first such layer.
    """
    numbers = {number for each in used for number in each.updates}
    paths = {state.layers[number].adapter_path for number in numbers}
    reasons = state.base.for_all_rows
    found = sorted(paths & reasons.keys())
    if found:
        raise RouteError(
            f"the rows cannot differ: {len(found)} adapted layers, such as {found[0]}, "
            f"{reasons[found[0]]}; route the whole batch to one adapter, or leave them out"
        )


def _mixed(
    state: Attachment, updates: UpdatesByName, choices: RowChoices, device: torch.device
) -> Frame:
    """The frame of a mixed batch: that of the latest one, if nothing has changed since."""
    parameters = [p for own in updates.values() for u in own.values() for p in u.parameters()]
    made_from = (choices, device, choice.fast(), _fingerprint(parameters))
    if state.mixed is not None and state.mixed[0] == made_from:
        return state.mixed[1]
    trains = any(p.requires_grad for p in parameters)
    # The unchanging form holds copies of A and B, which would get no gradients.
    make = static_operations if state.compiled and not trains else mixed_operations
    frame = Frame.of(make(dict(state.layers), updates, choices, device))
    # While the memory is held, nothing else can be at its address.
    state.mixed = (made_from, frame, [p.untyped_storage() for p in parameters])
    return frame


def _fingerprint(parameters: Sequence[nn.Parameter]) -> tuple[Any, ...]:
    """A value that differs once a parameter was replaced, moved, frozen, unfrozen, or, if it is
    frozen, written: those under training are read where they are, in each forward pass.

    Torch does not count what is written through `.data` in place.
    """
    return tuple(
        (p.data_ptr(), None if p.requires_grad else _writes(p), p.requires_grad) for p in parameters
    )


def _writes(parameter: nn.Parameter) -> object:
    """How often a parameter was written; what differs each time where torch does not count."""
    return object() if parameter.is_inference() else write_count(parameter)
