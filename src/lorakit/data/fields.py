"""The map from lorakit's fields to a file's columns: by name, or by a template of several."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from lorakit.config.train import RowField
from lorakit.data.problems import UnusableRowError
from lorakit.errors import did_you_mean

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


class FieldMap:
    """The column, or template of columns, that each field is made from."""

    def __init__(self, fields: Mapping[RowField, str]) -> None:
        self._fields = fields

    def __contains__(self, name: RowField) -> bool:
        """Whether the settings name a column or template for the field."""
        return name in self._fields

    def absent(self, name: RowField, columns: Collection[str]) -> list[str]:
        """The columns that a field lacks, each as "'x'; did you mean 'y'?"; none if it has all."""
        made_from = self._columns(name, columns)
        return [f"{c!r}{did_you_mean(c, columns)}" for c in made_from if c not in columns]

    def value(self, name: RowField, values: Mapping[str, Any]) -> Any:
        """A field's value: that of its column, or its template filled in; None if one is absent.

        Args:
            name: the field.
            values: the values of one raw row by column.
        """
        source = self._fields.get(name, name)
        if source in values:
            return values[source]
        columns = _PLACEHOLDER.findall(source)
        if not columns or any(values.get(column) is None for column in columns):
            return None
        return _PLACEHOLDER.sub(lambda found: as_text(found[1], values[found[1]]), source)

    def text(self, name: RowField, values: Mapping[str, Any]) -> str:
        """A field's value as text.

        Raises:
            UnusableRowError: it is absent, or is no text.
        """
        value = self.value(name, values)
        if value is None:
            there = ", ".join(column for column in values if values[column] is not None)
            raise UnusableRowError(f"there is no {self._described(name)}; it has {there or 'none'}")
        return as_text(self._described(name), value)

    def _columns(self, name: RowField, columns: Collection[str]) -> list[str]:
        source = self._fields.get(name, name)
        return [source] if source in columns else _PLACEHOLDER.findall(source) or [source]

    def _described(self, name: RowField) -> str:
        source = self._fields.get(name, name)
        return name if source == name else f"{name} ({source})"


def as_text(name: str, value: Any) -> str:
    """A value as text: a text itself, or a number written out.

    Raises:
        UnusableRowError: it is neither, or has half of a surrogate pair.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UnusableRowError(f"{name} is {_type_of(value)}, where a text is needed")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UnusableRowError(f"{name} has half of a surrogate pair, which is no character")
    return value


def as_number(value: Any) -> float:
    """A label as a number: a finite number, or the text of one.

    Raises:
        UnusableRowError: it is not.
    """
    try:
        number = float(as_text("label", value))
    except ValueError:
        raise UnusableRowError(f"label is {value!r}, where a number is needed") from None
    if not math.isfinite(number):
        raise UnusableRowError(f"label is {value!r}, where a finite number is needed")
    return number


def _type_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")
