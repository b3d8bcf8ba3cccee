"""What the rows of a batch use, and batches of some of these rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lorakit.attachment.state import attachment_of
from lorakit.errors import RouteError
from lorakit.layers.route import Combination
from lorakit.routing.choices import RowChoices
from lorakit.routing.route import route_rows


def names_of_rows(model: nn.Module, rows: int) -> list[tuple[str, ...]]:
    """The names of the adapters that each row of a batch uses; none: the base.

    Raises:
        RouteError: the route is for another number of rows.
    """
    return [tuple(name for name, _ in used) for used in _choices(model, rows)]


@contextmanager
def part_of_route(model: nn.Module, rows: Sequence[int], *, of: int) -> Iterator[None]:
    """Have a batch of some of a route's rows use what these use, inside a block.

    Args:
        model: a model, with a route for rows or without.
        rows: the numbers of the rows, in any order; a number may be there several times.
        of: how many rows there are.

    Raises:
        RouteError: the route is for another number of rows.
    """
    state = attachment_of(model)
    if state is None or state.route.frame.rows is None:
        yield
        return
    choices = _choices(model, of)
    used = [dict(choices[row]) or None for row in rows]
    with route_rows(model, RowChoices.of(used, state.adapters)):
        yield


def _choices(model: nn.Module, rows: int) -> tuple[Combination, ...]:
    state = attachment_of(model)
    if state is None:
        return ((),) * rows
    frame = state.route.frame
    if frame.rows not in (None, rows):
        raise RouteError(f"the route is for {frame.rows} rows, but there are {rows}")
    if frame.choices is None:
        return (((frame.name, 1.0),) if frame.name is not None else (),) * rows
    return frame.choices if len(frame.choices) == rows else frame.choices * rows
