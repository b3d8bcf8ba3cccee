"""What the rows of a batch use, and batches of some of these rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from lorakit.attachment.state import Attachment, attachment_of
from lorakit.errors import RouteError
from lorakit.kernels import choice
from lorakit.layers.route import Combination, Frame
from lorakit.routing.choices import RowChoices
from lorakit.routing.route import route_rows
from lorakit.routing.slot_content import Terms, slot_content
from lorakit.routing.slots import Slots

MOST_PADDING = 2.0
"""How many times the ranks of the adapters their slots may have."""


def names_of_rows(model: nn.Module, rows: int) -> list[tuple[str, ...]]:
    """The names of the adapters that each row of a batch uses; none: the base.

    Raises:
        RouteError: the route is for another number of rows.
    """
    return [tuple(name for name, _ in used) for used in _choices(model, rows)]


class RouteParts:
    """Batches of some of a route's rows, each of which uses what those rows use.

    Each combination of adapters in a batch has a slot. The next batch writes only those that it
    lacks, in place of others. What can't be in slots, or would be padded to more than twice its
    ranks, is routed anew for each batch.

    Args:
        model: a model, with a route for rows or without.
        rows: how many rows there are.
        at_once: how many of them a batch has at most.

    Raises:
        RouteError: the route is for another number of rows.

    Examples:
        >>> with lk.route(model, ["places", "sql", None]):  # doctest: +SKIP
        ...     parts = RouteParts(model, 3, at_once=2)
        ...     with parts.of([2, 0]):
        ...         logits = model(**batch_of_two_rows).logits
    """

    def __init__(self, model: nn.Module, rows: int, *, at_once: int) -> None:
        self._model, self._choices = model, _choices(model, rows)
        state = attachment_of(model)
        self._state = None if state is None or state.route.frame.rows is None else state
        self._at_once = at_once

    @contextmanager
    def of(self, rows: Sequence[int]) -> Iterator[None]:
        """Have a batch of some rows use what these use, inside a block.

        Args:
            rows: their numbers, in any order; one may be there several times.

        Raises:
            RouteError: an adapter was detached meanwhile, or the rows cannot differ.
        """
        if self._state is None:
            yield
            return
        used = tuple(self._choices[row] for row in rows)
        frame = self._frame_of_slots(self._state, used) if len(set(used)) > 1 else None
        if frame is not None:
            with self._state.route.block(frame):
                yield
            return
        choices = RowChoices.of([dict(each) or None for each in used], self._state.adapters)
        with route_rows(self._model, choices):
            yield

    def _frame_of_slots(self, state: Attachment, used: tuple[Combination, ...]) -> Frame | None:
        """The frame of a batch whose rows use these, from slots; None: they have none."""
        # Slots look at weights that the model may read by itself, and then not where rows differ.
        with state.route.own.pushed(Frame()):
            slots = self._slots
            return None if slots is None else slots.frame(used)

    @cached_property
    def _slots(self) -> _SlotsOfRows | None:
        """Slots for what the rows use, made for the first batch whose rows differ; None: no fit."""
        # Those of a compiled model have one form, and without fast kernels each is computed alone.
        if self._state is None or self._state.compiled or not choice.fast():
            return None
        return _SlotsOfRows.of(self._model, self._state, self._choices, self._at_once)


class _SlotsOfRows:
    """Slots for the combinations of adapters that rows use."""

    def __init__(self, slots: Slots, terms: Mapping[Combination, Terms]) -> None:
        self._slots, self._terms = slots, terms
        self._held: list[Combination | None] = [None] * slots.count
        """What each slot holds; None: nothing yet."""
        self._latest: tuple[tuple[Combination, ...], Frame] | None = None

    @staticmethod
    def of(
        model: nn.Module, state: Attachment, choices: Sequence[Combination], at_once: int
    ) -> _SlotsOfRows | None:
        """Slots for some rows, of which so many are in a batch; None: these don't fit."""
        terms: dict[Combination, Terms] = {
            used: [(state.adapters[name].updates, weight) for name, weight in used]
            for used in dict.fromkeys(choices)
            if used
        }
        try:
            contents = [slot_content(state, each) for each in terms.values()]
        except RouteError:
            # A route may do it, and else says why not.
            return None
        # No row is computed in another precision because of its neighbours.
        dtypes = set[torch.dtype]().union(*(each.dtypes() for each in contents))
        if len(dtypes) != 1 or _padding([each.ranks() for each in contents]) > MOST_PADDING:
            return None
        slots = Slots(model, min(len(terms), at_once), dtype=dtypes.pop())
        for each in terms.values():
            slots.reserve(each)
        return _SlotsOfRows(slots, terms)

    def frame(self, used: tuple[Combination, ...]) -> Frame:
        """The frame of a batch whose rows use these."""
        missing = [each for each in dict.fromkeys(used) if each and each not in self._held]
        if missing or self._latest is None or self._latest[0] != used:
            free = [at for at, each in enumerate(self._held) if each not in used]
            for at, combination in zip(free, missing, strict=False):
                self._slots.join(at, self._terms[combination])
                self._held[at] = combination
            slots = [self._held.index(each) if each else -1 for each in used]
            self._latest = used, replace(self._slots.frame(slots), choices=used)
        return self._latest[1]


def _padding(ranks: Sequence[Mapping[int, int]]) -> float:
    """How many times their own ranks slots for these adapters have; by the layer's number."""
    own = sum(sum(each.values()) for each in ranks)
    widest = {n: max(each.get(n, 0) for each in ranks) for n in set().union(*ranks)}
    return len(ranks) * sum(widest.values()) / max(own, 1)


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
