"""Nested values as columns: data.question is the value of question within that of data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.data.file_formats import RawRow

_PLACEHOLDER = re.compile(r"\{([^{}?]+)\??\}")


def with_nested(raw: Sequence[RawRow], fields: Mapping[Any, str]) -> tuple[RawRow, ...]:
    """Raw rows that have as columns the nested values which fields name, such as answers.text.0.

    The value that they are within is no column then, unless a field names it too. A column whose
    own name has dots is that column.

    Args:
        raw: the rows of one source.
        fields: the column, or template of columns, of each field.
    """
    named = {name for source in fields.values() for name in _columns(source)}
    dotted = [name for name in named if "." in name]
    return tuple(_expanded(row, dotted, named) for row in raw) if dotted else tuple(raw)


def rows_within(raw: Sequence[RawRow]) -> str:
    """The end of a message: that one object was read, and that it has the rows in a list."""
    if len(raw) != 1:
        return ""
    for name, value in raw[0].values.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return (
                f"\nThe file is one row, whose {name!r} has a list of {len(value)} objects: if "
                "these are the rows, save that list alone."
            )
    return ""


def _columns(source: str) -> Iterator[str]:
    yield from _PLACEHOLDER.findall(source) or [source]


def _expanded(row: RawRow, dotted: Collection[str], named: Collection[str]) -> RawRow:
    values = dict(row.values)
    for name in dotted:
        if name not in row.values and (found := _within(row.values, name)) is not None:
            values[name] = found
    outer = {name.partition(".")[0] for name in values.keys() - row.values.keys()}
    kept = {key: value for key, value in values.items() if key not in outer or key in named}
    return replace(row, values=kept)


def _within(values: Any, name: str) -> Any:
    """The value at a dotted path of keys and list positions, or None."""
    for part in name.split("."):
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, Sequence) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return values
