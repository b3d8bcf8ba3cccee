"""Marks: what is true of a setting beyond the type of its value, written where it is declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What is true of a setting; one without a mark has these defaults.

    The mark of a section, which is a setting that holds settings, is the mark of all in it.
    """

    varies: bool = False
    """It may differ between the trials of a sweep."""
    on_card: bool = True
    """The training card lists it among the settings. Not what the adapter, or another entry of the
    card, records already."""
    compared: bool = True
    """A resumed sweep trains a finished trial again if this setting has another value now."""


Shared = Annotated[T, Mark()]
"""A setting that all trials of a sweep have in common, such as what loads the base."""
Varies = Annotated[T, Mark(varies=True)]
"""A setting that may differ between the trials of a sweep."""
Recorded = Annotated[T, Mark(varies=True, on_card=False)]
"""A setting that may differ between trials, and that the adapter or another entry of the card
holds."""
Invocation = Annotated[T, Mark(on_card=False, compared=False)]
"""A setting of one call: which folder it writes, and how it treats the files there."""


@dataclass(frozen=True)
class Escapes:
    """The mark of a text in which a flag's \\n, \\t and \\\\ stand for what they do in Python."""


def mark_of(settings: type[BaseModel], name: str) -> Mark:
    """The mark of a setting."""
    marks = (each for each in settings.model_fields[name].metadata if isinstance(each, Mark))
    return next(marks, Mark())


def settings_where(settings: type[BaseModel], holds: Callable[[Mark], bool]) -> list[str]:
    """The names of the settings of whose mark something holds, in order of declaration."""
    return [name for name in settings.model_fields if holds(mark_of(settings, name))]
