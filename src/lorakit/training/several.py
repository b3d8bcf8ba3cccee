"""Work for each of several runs, with one error for all that fail."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from lorakit.errors import LorakitError

T = TypeVar("T")
U = TypeVar("U")


def for_each(given: Mapping[str, T], work: Callable[[T, str], U]) -> dict[str, U]:
    """The result of some work for each value and its name.

    Raises:
        LorakitError: it failed; if for several, one error lists all.
    """
    made: dict[str, U] = {}
    errors: dict[str, LorakitError] = {}
    for name, value in given.items():
        try:
            made[name] = work(value, name)
        except LorakitError as error:
            errors[name] = error
    if len(errors) == 1 and len(given) == 1:
        raise next(iter(errors.values()))
    if errors:
        lines = [f"{name}: {error}" for name, error in errors.items()]
        raise type(next(iter(errors.values()))).listing("some trials cannot be trained", lines)
    return made
