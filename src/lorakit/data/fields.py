"""The map from lorakit's fields to a file's columns: by name, or by a template of several."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.config.rows import RowField
from lorakit.data.problems import UnusableRowError
from lorakit.errors import did_you_mean

_PLACEHOLDER = re.compile(r"(\s*)\{([^{}]+)\}")

USUAL: Mapping[RowField, str] = {
    "text": "anchor",
    "text_pair": "positive",
    "words": "tokens",
    "tags": "ner_tags",
}
"""The columns that fields have in the usual data sets of pairs of texts, and of entities."""


class FieldMap:
    """The column, or template of columns, that each field is made from.

    In a template, {column} is filled in. {column?} may be missing or empty: it is then left out,
    with the white space before it.
    """

    def __init__(
        self, fields: Mapping[RowField, str], notes: Mapping[RowField, str] | None = None
    ) -> None:
        self._fields = fields
        self.notes: Mapping[RowField, str] = notes or {}
        """Remarks on fields whose columns were recognised, and not named by the settings."""

    @classmethod
    def of(cls, fields: Mapping[RowField, str], columns: Collection[str]) -> FieldMap:
        """The map for these columns, also where they have another usual layout.

        ShareGPT's `conversations` are messages, Alpaca's columns are prompt and completion, and
        `USUAL` has more, where neither the settings nor the columns name these fields.
        """
        named = {*fields, *columns}
        found: dict[RowField, str] = {}
        notes: dict[RowField, str] = {}
        if "messages" not in named and "conversations" in columns:
            found["messages"] = "conversations"
            notes["messages"] = "conversations are read as messages"
        if not {"prompt", "completion"} & named and {"instruction", "output"} <= {*columns}:
            has_input = "input" in columns
            found["prompt"] = "{instruction}\n{input?}" if has_input else "instruction"
            found["completion"] = "output"
            read = "instruction and input" if has_input else "instruction"
            notes["prompt"] = f"the prompt is {read}, the completion is output"
        for name, column in USUAL.items():
            if name not in named and column in columns:
                found[name] = column
                notes[name] = f"{column} is read as {name}"
        return cls({**found, **fields}, notes)

    def __contains__(self, name: RowField) -> bool:
        """Whether the settings name a column or template for the field."""
        return name in self._fields

    def absent(self, name: RowField, columns: Collection[str]) -> list[str]:
        """The columns that a field lacks, each as "'x'; did you mean 'y'?"; none if it has all."""
        made_from = self.columns(name, columns)
        return [f"{c!r}{did_you_mean(c, columns)}" for c in made_from if c not in columns]

    def value(self, name: RowField, values: Mapping[str, Any]) -> Any:
        """A field's value: that of its column, or its template filled in; None if one is absent.

        Args:
            name: the field.
            values: the values of one raw row by column.
        """
        source = self._fields.get(name, name)
        if source in values:
            return None if is_missing(values[source]) else values[source]
        parts = [_Part.of(found[2], values) for found in _PLACEHOLDER.finditer(source)]
        if not parts or any(is_missing(part.value) and not part.optional for part in parts):
            return None
        left = iter(parts)
        return _PLACEHOLDER.sub(lambda found: next(left).after(found[1]), source)

    def columns(self, name: RowField, columns: Collection[str]) -> list[str]:
        """The columns that a field is made from, whether they are there or not."""
        source = self._fields.get(name, name)
        if source in columns:
            return [source]
        inside = (found[2] for found in _PLACEHOLDER.finditer(source))
        return [_column(each, columns)[0] for each in inside] or [source]

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

    def _described(self, name: RowField) -> str:
        source = self._fields.get(name, name)
        return name if source == name else f"{name} ({source})"


@dataclass(frozen=True, slots=True)
class _Part:
    """A placeholder of a template, with the value of its column."""

    column: str
    optional: bool
    value: Any

    @classmethod
    def of(cls, inside: str, values: Mapping[str, Any]) -> _Part:
        """The part that is written as {inside}."""
        column, optional = _column(inside, values)
        return cls(column, optional, values.get(column))

    def after(self, space: str) -> str:
        """The text that it stands for, after the white space before it."""
        if self.optional and (is_missing(self.value) or self.value == ""):
            return ""
        return space + as_text(self.column, self.value)


def _column(inside: str, columns: Collection[str]) -> tuple[str, bool]:
    """The column that {inside} names, and whether it may be missing."""
    if inside.endswith("?") and inside not in columns:
        return inside[:-1], True
    return inside, False


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, or NaN, as which pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(name: str, value: Any) -> str:
    """A value as text: a text itself, or a finite number written out.

    Raises:
        UnusableRowError: it is neither, or has half of a surrogate pair.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableRowError(f"{name} is {value}, where a text is needed")
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
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = float(value if is_number else as_text("label", value))
    except (ValueError, OverflowError):
        raise UnusableRowError(f"label is {value!r}, where a number is needed") from None
    if not math.isfinite(number):
        raise UnusableRowError(f"label is {value!r}, where a finite number is needed")
    return number


def _type_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")
