"""Marks: what is true of a setting beyond the type of its value, written where it is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What is true of a setting; one without a mark has these defaults.

    The mark of a section, which is a setting that holds settings, is the mark of all in it that
    have none of their own. Which these are is listed in a test, so that a new one is decided too.
    """

    varies: bool = False
    """It may differ between the trials of a sweep."""
    on_card: bool = True
    """The training card lists it among the settings. Not what the adapter, or another entry of the
    card, records already."""
    compared: bool = True
    """A resumed sweep trains a finished trial again if this setting has another value now."""
    may_change: bool = False
    """A resumed run may have another value than its checkpoint was saved with."""


Shared = Annotated[T, Mark()]
"""A setting that all trials of a sweep have in common, such as what loads the base."""
Varies = Annotated[T, Mark(varies=True)]
"""A setting that may differ between the trials of a sweep."""
Extends = Annotated[T, Mark(varies=True, may_change=True)]
"""A setting that may differ between trials, and that a resumed run may change: how long a run is,
and how it is scored."""
Handles = Annotated[T, Mark(may_change=True)]
"""A setting that trials have in common, and that a resumed run may change: it has no effect on what
is computed."""
Recorded = Annotated[T, Mark(varies=True, on_card=False)]
"""A setting that may differ between trials, and that the adapter or another entry of the card
holds."""
OfBase = Annotated[T, Mark(on_card=False)]
"""A setting that trials have in common, since it makes the base what it is, and that the adapter
holds."""
RowSource = Annotated[T, Mark(varies=True, on_card=False, may_change=True)]
"""A setting that says where rows are. A resumed run tells the rows themselves apart."""
Invocation = Annotated[T, Mark(on_card=False, compared=False)]
"""A setting of one call: which folder it writes, and how it treats the files there."""


@dataclass(frozen=True)
class Escapes:
    """The mark of a text in which a flag's \\n, \\t and \\\\ stand for what they do in Python."""


def mark_of(settings: type[BaseModel], name: str, *, default: Mark | None = None) -> Mark:
    """The mark of a setting; the default one where it has none."""
    marks = (each for each in settings.model_fields[name].metadata if isinstance(each, Mark))
    return next(marks, default or Mark())


def settings_where(
    settings: type[BaseModel], holds: Callable[[Mark], bool], *, default: Mark | None = None
) -> list[str]:
    """The names of the settings of whose mark something holds, in order of declaration.

    Args:
        settings: the class of a run's settings, or of a section.
        holds: what is asked of a mark.
        default: the mark of a section, for settings in it that have none.
    """
    return [
        name for name in settings.model_fields if holds(mark_of(settings, name, default=default))
    ]


def flat_settings(
    settings: BaseModel, *, within: str = "", mark: Mark | None = None
) -> Iterator[tuple[str, Mark, Any]]:
    """Each setting, those of sections one by one: its dotted name, its mark and its JSON value."""
    values = settings.model_dump(mode="json")
    for name, value in values.items():
        own = mark_of(type(settings), name, default=mark)
        inner = getattr(settings, name)
        if isinstance(inner, BaseModel):
            yield from flat_settings(inner, within=f"{within}{name}.", mark=own)
        else:
            yield f"{within}{name}", own, value
