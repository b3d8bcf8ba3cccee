"""The class labels of classification rows: their names, their order, and their mistakes."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from lorakit.data.fields import as_text
from lorakit.data.problems import UnusableRowError
from lorakit.errors import ConfigError, DataError

_WHOLE = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"(-?\d*)\.(\d+)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

_UNNAMED = re.compile(r"LABEL_\d+")
"""The name that transformers gives to a class without one."""

UNKNOWN_LABEL = "unknown label"
"""What the problem of a row with a label that is not among the known ones begins with."""


def head_classes(
    asked: Sequence[str] | None, own: tuple[str, ...] | None, *, whose: object, hint: str = ""
) -> tuple[str, ...] | None:
    """The names of the classes in the order of a head that is trained already.

    Args:
        asked: the names that the settings list, if they do; they may give all classes new names.
        own: the classes of the head; None: it has none yet, and any will do.
        whose: the model or adapter that has the head, for messages.
        hint: what may be done about other classes, for messages.

    Raises:
        ConfigError: the settings have another number of classes, or the same ones in another order.
    """
    if asked is None or own is None or tuple(asked) == own:
        return own if asked is None else tuple(asked)
    classes = f"the classes of {whose} are, in the order of its head, {', '.join(own)}"
    if len(asked) != len(own):
        raise ConfigError(f"data.labels has {len(asked)} classes, and {classes}\n{hint}".rstrip())
    if set(asked) & set(own):
        raise ConfigError(f"data.labels is {', '.join(asked)}, but {classes}: leave it out")
    return tuple(asked)


def are_unnamed(names: Collection[str]) -> bool:
    """Whether classes have the names that transformers gives to those without one."""
    return all(map(_UNNAMED.fullmatch, names))


def class_name(value: Any, *, known: tuple[str, ...] | None) -> str:
    """The name of the class that a label stands for.

    1, 1.0 and "1" are all the class "1". Where the known names are words, a whole number is a
    position among them, counted from 0.

    Raises:
        UnusableRowError: the label is unknown, or is no class but a number to predict, several
            labels, or the text of a missing one.
    """
    if isinstance(value, list | tuple):
        raise UnusableRowError(
            f"label is a list of {len(value)}, and a row has one class: for several at once set"
            " task: multi-label, with the field labels"
        )
    name = str(value) if isinstance(value, bool) else as_text("label", value).strip()
    if known is not None:
        return _known_name(name, known)
    if name.lower() == "nan":
        raise UnusableRowError(
            f"label {name} stands for a missing one: leave out the row, or list the classes in"
            " data.labels if one is called so"
        )
    if _is_fraction(name):
        raise UnusableRowError(
            f"label {name} is a fraction: set task: regression, or list the classes in data.labels"
        )
    decimal = _DECIMAL.fullmatch(name)
    return decimal[1] if decimal else name


def _is_fraction(name: str) -> bool:
    """Whether a label is a number that is not whole, such as 2.5 or 1e-05."""
    return bool(_NUMBER.fullmatch(name)) and not float(name).is_integer()


def _known_name(name: str, known: tuple[str, ...]) -> str:
    decimal = _DECIMAL.fullmatch(name)
    whole = decimal[1] if decimal and not int(decimal[2]) else name
    if name in known:
        return name
    if whole in known:
        return whole
    if whole.isdecimal() and int(whole) < len(known) and not any(map(_WHOLE.fullmatch, known)):
        return known[int(whole)]
    hint = ": name the head's classes, in this order, in data.labels" if are_unnamed(known) else ""
    raise UnusableRowError(f"{UNKNOWN_LABEL} {name!r}; the labels are {', '.join(known)}{hint}")


def class_order(names: Collection[str], *, source: str) -> tuple[str, ...]:
    """The distinct names, sorted: as numbers where all are numbers, else as text.

    Raises:
        DataError: there is one or none, so that there is nothing to tell apart.
    """
    distinct = set(names)
    if len(distinct) < 2:
        found = f"every row has the label {distinct.pop()!r}" if distinct else "no row has a label"
        raise DataError(
            f"{source}: {found}, so there is nothing to learn."
            " Use rows of two classes or more, or list the classes in data.labels."
        )
    if all(map(_WHOLE.fullmatch, distinct)):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))
