"""What each row of a batch uses, in one form, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import RouteError, did_you_mean
from lorakit.layers.operation import Update
from lorakit.layers.route import Combination

Choice = str | Mapping[str, float] | None
"""What a caller says that a row uses: an adapter, several with weights, or None for the base."""


@dataclass(frozen=True)
class RowChoices:
    """Which combination of adapters each row of a batch uses."""

    combinations: tuple[Combination, ...]
    """The distinct ones that are not the base, without weights of 0."""
    index_of_row: tuple[int, ...]
    """For each row the index of its combination; -1: the base. Rows that all use the same need not
    be told apart: then this has one entry, whatever their number."""
    rows: int | None = field(compare=False)
    """The number of rows; None: one choice serves batches of any number."""
    names: tuple[str, ...] = field(compare=False)
    """The adapters that are named, those of weight 0 too."""

    @staticmethod
    def of(names: Choice | Sequence[Choice], known: Mapping[str, Any]) -> RowChoices:
        """The choices that a caller gave: one for all rows, or one for each.

        Args:
            names: the choices.
            known: what they may name.

        Raises:
            RouteError: a choice is neither a name, None, nor names with numbers; a name is not
                known, or a weight not finite.
        """
        # Of what is none of these `_combination` says so.
        for_all = not isinstance(names, Iterable) or isinstance(names, str | Mapping)
        each: Any = [names] if for_all else names
        given = [_combination(choice, row) for row, choice in enumerate(each)]
        problems = dict.fromkeys(_problems(given, known))
        if problems:
            raise RouteError(f"{'; '.join(problems)}; attached: {list(known)}")
        used = [tuple(term for term in combination if term[1]) for combination in given]
        distinct = [combination for combination in dict.fromkeys(used) if combination]
        index = {combination: at for at, combination in enumerate(distinct)}
        index_of_row = tuple(index.get(combination, -1) for combination in used)
        return RowChoices(
            combinations=tuple(distinct),
            index_of_row=index_of_row[:1] if len(set(index_of_row)) == 1 else index_of_row,
            rows=None if for_all else len(given),
            names=tuple(dict.fromkeys(name for combination in given for name, _ in combination)),
        )

    @property
    def of_each(self) -> tuple[Combination, ...]:
        """The combination of each row, or of all (one entry)."""
        used = tuple(self.combinations[at] if at >= 0 else () for at in self.index_of_row)
        return used * self.rows if self.rows is not None and len(used) == 1 else used

    @property
    def only_adapter(self) -> str | None:
        """The adapter that all rows use alone, at weight 1; None: there is none."""
        if len(self.index_of_row) > 1 or not self.combinations:
            return None
        (name, weight), *others = self.combinations[0]
        return name if weight == 1 and not others else None

    def among(self, indices: Sequence[int]) -> tuple[int, ...]:
        """For each row the place of its combination in a list of some; -1 if it is not in it."""
        place = {index: at for at, index in enumerate(indices)}
        return tuple(place.get(index, -1) for index in self.index_of_row)


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
            "names and weights"
        ) from None


def _problems(given: Sequence[Combination], known: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with each row's choice."""
    if not given:
        yield "no rows: give a choice for each row of the batch, or one for all"
    for row, combination in enumerate(given):
        for name, weight in combination:
            if name not in known:
                yield f"no such adapter: {name!r}{did_you_mean(name, known)}"
            elif not math.isfinite(weight):
                yield f"row {row} asks for {name!r} with weight {weight}"


UpdatesByName = Mapping[str, Mapping[int, Update]]
"""The updates of each adapter, by its name and the layer's number."""

Terms = dict[int, list[tuple[Update, float]]]
"""The terms of one layer: by the index of a combination, its updates with their weights."""
